"""Replies on their way to a ServerApp, and the files of their arrays.

An app need not take a reply, so their number and size have bounds. The folder of the files, `in`,
is in that of the run, which the app may change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from coordinator.runs.apps import frames
from coordinator.runs.apps.frames import Reply
from protocols.local import own_folders
from protocols.messages.envelope import MAX_PEERS

#: Replies that wait: their number, their records, which are in memory, and their files.
MAX_WAITING, MAX_WAITING_BYTES, MAX_FILES_BYTES = MAX_PEERS, 256 * 1024 * 1024, 16 * 1024**3
DROPPED = "its answer was dropped: too many waited, and the ServerApp took none"


class _Waiting(NamedTuple):
    reply: Reply
    nbytes: int


class Lane:
    """The replies of one run, by the numbers of their messages. `folder`: of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[int, _Waiting] = {}  # oldest first
        self.waiting_bytes = self._files_bytes = 0
        self._dropped = deque[int](maxlen=MAX_WAITING)
        #: Messages whose replies the ServerApp awaits no more.
        self._unwanted = set[int]()

    def put_file(self, source: Path, number: int) -> None:
        """Move the arrays of a reply to where the ServerApp finds them. Raises OSError."""
        with own_folders.opened(self._folder, frames.IN) as folder:
            folder.put(source, _name(number))

    def put(self, reply: Reply, nbytes: int = 0) -> None:
        """Keep a reply, whose file has `nbytes`, until it is taken. The oldest go if there are too
        many."""
        if reply.id in self._unwanted:
            self._unwanted.discard(reply.id)
            self._delete_file(reply)
            return
        self._waiting[reply.id] = _Waiting(reply, nbytes)
        self._count(reply, nbytes)
        while (
            len(self._waiting) > MAX_WAITING
            or self.waiting_bytes > MAX_WAITING_BYTES
            or self._files_bytes > MAX_FILES_BYTES
        ):
            oldest = next(iter(self._waiting))
            self._dropped.append(oldest)
            self._drop(oldest)

    def take(self, numbers: Collection[int]) -> list[Reply]:
        """Take some of these replies; an error for each that was dropped."""
        wanted = set(numbers)
        found = sorted(wanted & self._waiting.keys())[: frames.MAX_REPLIES]
        replies = [self._waiting.pop(number) for number in found]
        for reply, nbytes in replies:
            self._count(reply, nbytes, -1)
        dropped = wanted.intersection(self._dropped) if self._dropped else set()
        lost = sorted(dropped)[: frames.MAX_REPLIES - len(replies)]
        for number in lost:
            self._dropped.remove(number)
        return [one.reply for one in replies] + [Reply(id=one, error=DROPPED) for one in lost]

    def forget(self, numbers: Collection[int], sent: Collection[int]) -> None:
        """The ServerApp takes no reply to these messages. `sent`: those without a reply."""
        self._unwanted.update(set(numbers).intersection(sent))
        for number in numbers:
            if number in self._waiting:
                self._drop(number)

    def _drop(self, number: int) -> None:
        reply, nbytes = self._waiting.pop(number)
        self._count(reply, nbytes, -1)
        self._delete_file(reply)

    def _count(self, reply: Reply, nbytes: int, sign: int = 1) -> None:
        self.waiting_bytes += sign * len(reply.told)
        self._files_bytes += sign * nbytes

    def _delete_file(self, reply: Reply) -> None:
        if reply.has_arrays:
            try:
                with own_folders.opened(self._folder, frames.IN) as folder:
                    folder.unlink(_name(reply.id))
            except OSError:  # the app has changed its folder
                pass


def _name(number: int) -> str:
    return f"{number}{frames.SUFFIX}"
