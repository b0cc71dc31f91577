"""The Grid that strategies use: messages in this process, weights by digest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower import Superlink
from coordinator.transport.flower_records import WEIGHTS, VersionRecord, as_weights, weights_record


class ClaimCheckGrid(Grid):
    """A Grid over the Superlink of this process: no polling, one push for all messages.

    It replaces the arrays in a message by the digest of a version in `store`, and saves a new
    version if necessary (a VersionRecord is there already). Replies are returned as they arrive,
    with the agent's claim. `get_node_ids` returns `eligible`, so an unmodified strategy samples
    among the peers that can work.
    """

    def __init__(self, superlink: Superlink, store: WeightStore) -> None:
        self._superlink, self._store = superlink, store
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
        messages = list(messages)
        claims: dict[int, RecordDict] = {}
        for message in messages:
            content = message.content
            if id(content) not in claims:
                claims[id(content)] = self._claim_check(content)
            message.content = claims[id(content)]
        return self._superlink.push_messages(messages)

    def _claim_check(self, content: RecordDict) -> RecordDict:
        slim = RecordDict()
        for name, record in content.items():
            if not isinstance(record, ArrayRecord):
                slim[name] = record
                continue
            saved = record.digest if isinstance(record, VersionRecord) else ""
            digest = saved or self._store.save(as_weights(record))
            slim[WEIGHTS] = weights_record(digest, self._store.version_path(digest).stat().st_size)
        return slim

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
