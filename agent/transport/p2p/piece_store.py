"""The versions that this agent can serve to peers: complete ones and the one in download.

Download threads write; the event loop of the server reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from protocols.local.atomic_files import write_all
from protocols.p2p.swarm import PIECE_BYTES, DownloadPlan, num_pieces


class Notifier:
    """Wakes threads and coroutines that wait for a change by another thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()

    def notify(self) -> None:
        """Wakes all waiters; callable from any thread."""
        with self._changed:
            listeners = tuple(self._listeners)
            self._changed.notify_all()
        for listener in listeners:
            listener()

    def wait(self, within_s: float) -> None:
        """Waits for the next change, at most `within_s` seconds. Blocking."""
        with self._changed:
            self._changed.wait(within_s)

    async def wait_for(self, condition: Callable[[], object], within_s: float) -> bool:
        """Waits for a condition; False if it does not hold in time."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.add(listener)
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return bool(condition())
        finally:
            with self._changed:
                self._listeners.discard(listener)
        return True


class StoredVersion:
    """One version: its open file, and the set of pieces that are missing.

    The file may be renamed while it is open. Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._file = path.open("rb", buffering=0)
        self.nbytes = nbytes
        self.missing: set[int] = set()
        self._lock = threading.Lock()
        self.changed = Notifier()

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self._file.closed

    def close(self) -> None:
        """Closes the file and wakes all waiters."""
        with self._lock:
            self._file.close()
        self.changed.notify()

    async def wait(self, piece: int, within_s: float) -> bool:
        """Waits for a piece; False if it does not arrive in time."""
        await self.changed.wait_for(
            lambda: self._file.closed or piece not in self.missing, within_s
        )
        return piece not in self.missing and not self._file.closed

    def read(self, start: int, stop: int) -> bytes:
        """Reads the bytes `start` to `stop`. Raises OSError if the file is closed or truncated."""
        with self._lock:
            if self._file.closed:
                raise OSError("the version was dropped")
            self._file.seek(start)
            data = self._file.read(stop - start) or b""
        if len(data) != stop - start:
            raise OSError("the version's file is truncated")
        return data


class PartialVersion(StoredVersion):
    """A version in download, piece by piece, from several threads.

    Pieces that an earlier attempt left in the file are verified and kept.
    """

    def __init__(self, path: Path, plan: DownloadPlan) -> None:
        super().__init__(path, plan.nbytes)
        self._plan = plan
        # A file and a lock of its own: the server reads while a write waits for the disk.
        self._out, self._out_lock = path.open("r+b", buffering=0), threading.Lock()
        pieces = range(num_pieces(plan.nbytes, plan.piece_bytes))
        self.missing = {
            piece for piece in pieces if not self._matches(piece, self._file.read(plan.piece_bytes))
        }
        self._wanted = self.missing.copy()  # neither present nor requested
        self._out.truncate(plan.nbytes)

    def take(self, limit: int = 1) -> range:
        """Takes the first consecutive pieces that are neither present nor requested."""
        with self._out_lock:
            first = stop = min(self._wanted, default=0)
            while stop - first < limit and stop in self._wanted:
                self._wanted.discard(stop)
                stop += 1
            return range(first, stop)

    def give_back(self, pieces: Iterable[int]) -> None:
        """Returns pieces that were taken; those that are not present can be taken again."""
        with self._out_lock:
            self._wanted |= self.missing.intersection(pieces)
        self.changed.notify()

    def span(self, piece: int) -> tuple[int, int]:
        """Bytes `start` to `stop` of a piece."""
        size = self._plan.piece_bytes
        return piece * size, min((piece + 1) * size, self.nbytes)

    def size(self, piece: int) -> int:
        """Returns the size of a piece in bytes."""
        start, stop = self.span(piece)
        return stop - start

    def put(self, piece: int, data: bytes) -> bool:
        """Writes a piece; False if the bytes do not match its digest."""
        if not self._matches(piece, data):
            return False
        with self._out_lock:
            self._out.seek(piece * self._plan.piece_bytes)
            write_all(self._out, memoryview(data))
            self.missing.discard(piece)
        self.changed.notify()
        return True

    def _matches(self, piece: int, data: bytes) -> bool:
        expected = self._plan.pieces[32 * piece : 32 * piece + 32]
        return hashlib.sha256(data).digest() == expected

    def sync(self) -> None:
        os.fsync(self._out.fileno())

    def end_writing(self) -> None:
        """Closes the file for writing; it can still be read."""
        self._out.close()


class PieceStore:
    """Partial and complete versions by digest."""

    def __init__(self) -> None:
        self._versions: dict[str, StoredVersion] = {}
        self._changed = Notifier()

    async def find(self, digest: str, within_s: float) -> StoredVersion | None:
        """Waits for a version: a peer may ask before our download has started."""
        await self._changed.wait_for(lambda: digest in self._versions, within_s)
        return self._versions.get(digest)

    def put(self, digest: str, path: Path) -> None:
        """Adds a complete version, or keeps the open one whose download has ended."""
        known = self._versions.get(digest)
        if known is None or not known.is_complete:
            self.add(digest, StoredVersion(path, path.stat().st_size))

    def add(self, digest: str, version: StoredVersion) -> None:
        """Adds a version, or replaces it."""
        self.drop(digest)
        self._versions[digest] = version
        self._changed.notify()

    def drop(self, digest: str) -> None:
        """Removes a version."""
        if (version := self._versions.pop(digest, None)) is not None:
            version.close()

    def close(self) -> None:
        """Removes all versions."""
        for digest in list(self._versions):
            self.drop(digest)


def pieces_of(start: int, stop: int) -> range:
    """Returns the pieces that contain the bytes `start` to `stop`."""
    return range(start // PIECE_BYTES, num_pieces(stop))
