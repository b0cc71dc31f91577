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

    def ring(self) -> None:
        """Wakes all waiters; callable from any thread."""
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    async def until(self, condition: Callable[[], object], within_s: float) -> bool:
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


class PartialVersion:
    """One version: its open file, and the set of pieces that are present.

    The file may be renamed while it is open. Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, nbytes: int, *, whole: bool) -> None:
        self._file = path.open("rb", buffering=0)
        self.nbytes = nbytes
        self._missing = set() if whole else set(range(num_pieces(nbytes)))
        self._lock = threading.Lock()
        self._bell = Notifier()
        self._closed = False

    @property
    def is_whole(self) -> bool:
        return not self._missing and not self._closed

    def add(self, piece: int) -> None:
        """Marks a verified piece as present."""
        with self._lock:
            self._missing.discard(piece)
        self._bell.ring()

    def close(self) -> None:
        """Closes the file and wakes all waiters."""
        with self._lock:
            self._closed = True
            self._file.close()
        self._bell.ring()

    async def wait(self, piece: int, within_s: float) -> bool:
        """Waits for a piece; False if it does not arrive in time."""
        here = piece not in self._missing or await self._bell.until(
            lambda: self._closed or piece not in self._missing, within_s
        )
        return here and not self._closed

    def read(self, start: int, stop: int) -> bytes:
        """Reads the bytes `start` to `stop`. Raises OSError if the file is closed or truncated."""
        with self._lock:
            if self._closed:
                raise OSError("the version was dropped")
            self._file.seek(start)
            data = self._file.read(stop - start) or b""
        if len(data) != stop - start:
            raise OSError("the version's file is truncated")
        return data


class PieceStore:
    """Partial and complete versions by digest."""

    def __init__(self) -> None:
        self._books: dict[str, PartialVersion] = {}
        self._bell = Notifier()

    async def find(self, digest: str, within_s: float) -> PartialVersion | None:
        """Waits for a version: a peer may ask before our download has started."""
        await self._bell.until(lambda: digest in self._books, within_s)
        return self._books.get(digest)

    def put(self, digest: str, path: Path) -> None:
        """Adds a complete version, or marks the one in download as complete."""
        known = self._books.get(digest)
        if known is not None and known.is_whole:
            return
        self._replace(digest, PartialVersion(path, path.stat().st_size, whole=True))

    def begin(self, digest: str, path: Path, nbytes: int) -> PartialVersion:
        """Starts a version in download."""
        book = PartialVersion(path, nbytes, whole=False)
        self._replace(digest, book)
        return book

    def drop(self, digest: str) -> None:
        """Removes a version."""
        self._replace(digest, None)

    def _replace(self, digest: str, book: PartialVersion | None) -> None:
        old = self._books.pop(digest, None)
        if book is not None:
            self._books[digest] = book
            self._bell.ring()
        if old is not None:
            old.close()


def pieces_of(start: int, stop: int) -> range:
    """Returns the pieces that contain the bytes `start` to `stop`."""
    return range(start // PIECE_BYTES, num_pieces(stop))
