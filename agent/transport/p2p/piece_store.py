"""The versions that this agent can serve to peers: complete ones and the one in download.

The download thread writes; the event loop of the server reads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from protocols.p2p.swarm import PIECE_BYTES, num_pieces


class Notifier:
    """Wakes coroutines that wait for another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()

    def notify(self) -> None:
        """Wakes all waiters; callable from any thread."""
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    async def wait_for(self, condition: Callable[[], object], within_s: float) -> bool:
        """Waits for a condition; False if it does not hold in time."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.add(listener)
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return bool(condition())
        finally:
            with self._lock:
                self._listeners.discard(listener)
        return True


class StoredVersion:
    """One version: its open file, and the set of pieces that are present.

    The file may be renamed while it is open. Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, nbytes: int, *, complete: bool) -> None:
        self._file = path.open("rb", buffering=0)
        self.nbytes = nbytes
        self._missing = set() if complete else set(range(num_pieces(nbytes)))
        self._lock = threading.Lock()
        self._changed = Notifier()

    @property
    def is_complete(self) -> bool:
        return not self._missing and not self._file.closed

    def add(self, piece: int) -> None:
        """Marks a verified piece as present."""
        self._missing.discard(piece)
        self._changed.notify()

    def close(self) -> None:
        """Closes the file and wakes all waiters."""
        with self._lock:
            self._file.close()
        self._changed.notify()

    async def wait(self, piece: int, within_s: float) -> bool:
        """Waits for a piece; False if it does not arrive in time."""
        await self._changed.wait_for(
            lambda: self._file.closed or piece not in self._missing, within_s
        )
        return piece not in self._missing and not self._file.closed

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
        """Adds a complete version, or marks the one in download as complete."""
        known = self._versions.get(digest)
        if known is None or not known.is_complete:
            self._replace(digest, StoredVersion(path, path.stat().st_size, complete=True))

    def begin(self, digest: str, path: Path, nbytes: int) -> StoredVersion:
        """Starts a version in download."""
        version = StoredVersion(path, nbytes, complete=False)
        self._replace(digest, version)
        return version

    def drop(self, digest: str) -> None:
        """Removes a version."""
        if (version := self._versions.pop(digest, None)) is not None:
            version.close()

    def _replace(self, digest: str, version: StoredVersion) -> None:
        self.drop(digest)
        self._versions[digest] = version
        self._changed.notify()


def pieces_of(start: int, stop: int) -> range:
    """Returns the pieces that contain the bytes `start` to `stop`."""
    return range(start // PIECE_BYTES, num_pieces(stop))
