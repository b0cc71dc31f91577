"""What this agent could hand to other peers: versions that it has, and the one that is coming.

Filled by the thread that fetches, read by the loop that serves.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from protocols.p2p.swarm import PIECE_BYTES, num_pieces


class Notifier:
    """Wakes coroutines that wait for what another thread does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()

    def ring(self) -> None:
        """Something has changed; from any thread."""
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    async def until(self, condition: Callable[[], object], within_s: float) -> bool:
        """True as soon as the condition holds; False if it does not in time."""
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
    """One version on the shelf: its open file, and which of its pieces are there.

    The file may get another name meanwhile. Raises OSError if it cannot be opened.
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
        """A piece has come and is right."""
        with self._lock:
            self._missing.discard(piece)
        self._bell.ring()

    def close(self) -> None:
        """No more will come, and nothing can be read: who waits for a piece is told so."""
        with self._lock:
            self._closed = True
            self._file.close()
        self._bell.ring()

    async def wait(self, piece: int, within_s: float) -> bool:
        """True as soon as the piece is there; False if it does not come in time."""
        here = piece not in self._missing or await self._bell.until(
            lambda: self._closed or piece not in self._missing, within_s
        )
        return here and not self._closed

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of the file. Raises OSError when it is closed or cut short."""
        with self._lock:
            if self._closed:
                raise OSError("the version was dropped")
            self._file.seek(start)
            data = self._file.read(stop - start) or b""
        if len(data) != stop - start:
            raise OSError("the version's file is cut short")
        return data


class PieceStore:
    """Books by digest."""

    def __init__(self) -> None:
        self._books: dict[str, PartialVersion] = {}
        self._bell = Notifier()

    async def find(self, digest: str, within_s: float) -> PartialVersion | None:
        """The book, as soon as it is here or begun: who was told of us may be quicker than we."""
        await self._bell.until(lambda: digest in self._books, within_s)
        return self._books.get(digest)

    def put(self, digest: str, path: Path) -> None:
        """A whole version is here; perhaps the one that has just come."""
        known = self._books.get(digest)
        if known is not None and known.is_whole:
            return
        self._replace(digest, PartialVersion(path, path.stat().st_size, whole=True))

    def begin(self, digest: str, path: Path, nbytes: int) -> PartialVersion:
        """A version is coming."""
        book = PartialVersion(path, nbytes, whole=False)
        self._replace(digest, book)
        return book

    def drop(self, digest: str) -> None:
        """The version is not here any more."""
        self._replace(digest, None)

    def _replace(self, digest: str, book: PartialVersion | None) -> None:
        old = self._books.pop(digest, None)
        if book is not None:
            self._books[digest] = book
            self._bell.ring()
        if old is not None:
            old.close()


def pieces_of(start: int, stop: int) -> range:
    """The pieces in which bytes `start` to `stop` lie."""
    return range(start // PIECE_BYTES, num_pieces(stop))
