"""The Grid that strategies use: messages in this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from coordinator.transport.flower import Superlink


class InProcessGrid(Grid):
    """A Grid over the Superlink of this process: no polling, one push for all messages.

    Messages have no weights: the signed work in them names a version by its digest. Replies are
    returned as they arrive, with the agent's claim. `get_node_ids` returns `eligible`, so an
    unmodified strategy samples among the peers that can work.
    """

    def __init__(self, superlink: Superlink) -> None:
        self._superlink = superlink
        self.eligible: set[int] = set()

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("the coordinator has one Flower run, set at its start")

    @property
    def run(self) -> Any:
        return self._superlink.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.eligible)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store the messages. Returns the ids of those whose nodes exist."""
        return self._superlink.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The complete replies to these messages. Each is returned once."""
        return self._superlink.pull_messages(message_ids)

    def delete_messages(self, message_ids: set[str]) -> None:
        """Delete messages, answered or not. Late replies to them are refused."""
        self._superlink.delete_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("a run pushes and pulls its messages itself")
