"""Bodies of requests and answers between wire and disk, without holding up the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.transport.http_connection import connection_of
from protocols.local.atomic_files import write_all
from protocols.local.early_writeback import Early

#: A thread costs more than such a piece takes.
_SMALL_BYTES = 16 * 1024
#: Pieces, 64 KB each at most, that may wait for the thread.
_MOST_WAITING = 32
#: So much of what goes out is read and encrypted before others have their turn.
_PIECE_BYTES = 256 * 1024


class Spooling:
    """Hashes and writes what comes in, in a worker thread while more comes in.

    What is too fast for that waits in its connection. Nothing is written once not `is_mine`.
    """

    def __init__(self, file: IO[bytes], is_mine: Callable[[], bool]) -> None:
        self._file, self._is_mine = file, is_mine
        self._sha = hashlib.sha256()
        self._early = Early(file.fileno(), file.tell())
        self._waiting: list[bytes] = []
        self._working: asyncio.Task[None] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that was written."""
        return self._sha.hexdigest()

    def read_again(self, path: Path) -> None:
        """Hash what is in the file from an earlier request."""
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                self._sha.update(piece)

    async def put(self, piece: bytes) -> None:
        """Take the next bytes. Raises OSError for those before them."""
        if self._working is None and len(piece) <= _SMALL_BYTES:
            self._write([piece])
            return
        self._waiting.append(piece)
        if self._working is None:
            self._working = asyncio.create_task(self._work_on())
        elif self._working.done() or len(self._waiting) >= _MOST_WAITING:
            await self.flush()

    async def flush(self) -> None:
        """Have all of it written, though not synced. Raises OSError."""
        working, self._working = self._working, None
        if working is not None:
            try:
                await working
            finally:
                rest, self._waiting = self._waiting, []
            self._write(rest)

    def write_now(self, piece: memoryview) -> None:
        """Write the next bytes, in a thread that has flushed. Raises OSError."""
        self._write([piece])

    async def _work_on(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await asyncio.to_thread(self._write, batch)

    def _write(self, batch: Sequence[bytes | memoryview]) -> None:
        for piece in batch:
            if not self._is_mine():
                return
            self._sha.update(piece)
            write_all(self._file, memoryview(piece))
            self._early.wrote(len(piece))


class WholeFile(Response):
    """A file from its beginning. Starlette's FileResponse asks a thread for every 64 KB of it."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(media_type="application/octet-stream")
        self.raw_headers = [
            (name, str(size).encode() if name == b"content-length" else value)
            for name, value in self.raw_headers
        ]
        self._path, self._size = path, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = connection_of(scope)
        with self._path.open("rb", buffering=0) as file:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            left = self._size
            while left > 0:
                if connection is not None and (given := await connection.give(file, left)):
                    left -= given
                    if not left:
                        await send({"type": "http.response.body", "body": b""})
                    continue
                if not (piece := file.read(min(left, _PIECE_BYTES))):
                    return  # cut short on disk: the connection ends
                left -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
                await asyncio.sleep(0)
