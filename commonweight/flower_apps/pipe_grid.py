"""A Grid for a ServerApp whose nodes and messages are the coordinator's, over two pipes.

Arrays travel as files in two folders of the run; the pipes carry everything else as frames
(`coordinator.runs.apps.frames`).
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from commonweight.flower_apps import flower_names, records

# After the names above, which switch telemetry off.
from flwr.app import Error, Message, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip

from coordinator.runs.apps import frames
from coordinator.runs.apps.frames import Content, Outgoing
from protocols.messages.refusals import AGENT_FAILED

#: How long the coordinator waits for replies before it answers that there are none, in seconds.
_POLL_S = 1.0


class Pipes(NamedTuple):
    """Both directions to the coordinator. One thread at a time may use them."""

    answers: IO[bytes]
    questions: IO[bytes]

    def read(self) -> Any:
        """The next frame. The process ends if the coordinator has ended."""
        head = self.answers.read(frames.LENGTH_BYTES)
        if len(head) < frames.LENGTH_BYTES:
            os._exit(1)
        return frames.decode_coordinator_frame(self.answers.read(frames.length_of(head)))

    def write(self, frame: Any) -> None:
        self.questions.write(frames.encode(frame))
        self.questions.flush()


class PipeGrid(Grid):
    """A Grid whose nodes and messages are the coordinator's. Legacy apps use many threads."""

    def __init__(self, pipes: Pipes, flower_run: int, outgoing: Path, incoming: Path) -> None:
        self._pipes, self._flower_run = pipes, flower_run
        self._out, self._in = outgoing, incoming
        self._lock = threading.Lock()
        self._asked: dict[int, Message] = {}

    def _ask(self, frame: Any) -> Any:
        with self._lock:
            self._pipes.write(frame)
            return self._pipes.read()

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("the run is that of the coordinator")

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=self._flower_run)

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
        found = self._ask(frames.NodesAsked())
        return list(found.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        outgoing, numbers = list(messages), dict[int, int]()
        contents: list[Content] = []
        sent: list[Outgoing] = []
        for message in outgoing:
            if id(message.content) not in numbers:
                numbers[id(message.content)] = len(contents)
                contents.append(self._pack(message.content))
            meta = message.metadata
            sent.append(
                Outgoing(
                    content=numbers[id(message.content)],
                    node=meta.dst_node_id,
                    message_type=meta.message_type,
                    group=meta.group_id,
                )
            )
        pushed = self._ask(frames.Push(contents=tuple(contents), messages=tuple(sent)))
        for number, message in zip(pushed.ids, outgoing, strict=True):
            if number:
                flower_names.name_message(message, str(number))
                self._asked[number] = message
        return [str(number) for number in pushed.ids if number]

    def _pack(self, content: RecordDict) -> Content:
        file = self._out / uuid.uuid4().hex
        packed = records.pack(content, file)
        if packed.digest:
            file.rename(self._out / f"{packed.digest}{frames.SUFFIX}")
        return Content(told=packed.told, digest=packed.digest)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._pull(message_ids, 0.0)

    def _pull(
        self, message_ids: Iterable[str], wait_s: float, forgotten: Iterable[str] = ()
    ) -> list[Message]:
        numbers = tuple(int(one) for one in message_ids if int(one) in self._asked)
        gone = tuple(map(int, forgotten))
        found = self._ask(frames.Pull(ids=numbers, wait_s=wait_s, forgotten=gone))
        return [self._reply(one) for one in found.replies]

    def _reply(self, found: Any) -> Message:
        asked = self._asked.pop(found.id)
        file = self._in / f"{found.id}{frames.SUFFIX}" if found.has_arrays else None
        try:
            if found.error:
                return flower_names.reply(asked, Error(AGENT_FAILED, found.error))
            return flower_names.reply(asked, records.unpack(found.told, file))
        except Exception as err:  # one peer's answer must not end the app
            traceback.print_exc()
            return flower_names.reply(asked, Error(AGENT_FAILED, f"it cannot be read: {err}"))
        finally:
            if file is not None:
                file.unlink(missing_ok=True)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        pending = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and (end is None or time.monotonic() < end):
            left = _POLL_S if end is None else max(0.0, min(_POLL_S, end - time.monotonic()))
            found = self._pull(pending, left)
            replies += found
            pending -= {reply.metadata.reply_to_message_id for reply in found}
        if pending:  # their replies would stay on the disk
            self._pull((), 0.0, forgotten=pending)
            for one in pending:
                self._asked.pop(int(one), None)
        return replies
