"""Moves request and response bodies between connections and files without blocking the loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.transport.http_connection import LimitedHttpProtocol, connection_of
from protocols.local.atomic_files import write_all
from protocols.local.early_writeback import EarlyWriteback

#: Below this size, a write takes less time than the switch to a thread.
_SMALL_BYTES = 16 * 1024
#: Pieces of at most 64 KB that may wait for the thread.
_MAX_WAITING = 32
#: Of all uploads together. A thousand at once would take gigabytes.
_MAX_WAITING_BYTES = 64 * 1024 * 1024
#: Read and encrypted at a time. Other connections are served after each piece. In pieces of
#: 1 MB, a download of 40 MB took 10 to 16 % longer.
_PIECE_BYTES = 256 * 1024
#: While more files than this are sent at once, each takes less memory: asyncio buffers 512 KB.
_FEW_FILES, _MANY_PIECE_BYTES = 32, 64 * 1024


class UploadWriter:
    """Hashes and writes an upload in a worker thread while more of it arrives.

    A full queue slows the sender down. Nothing is written after `is_current` returns False.
    """

    #: Bytes that wait for a thread, of all uploads.
    _total_bytes = 0

    def __init__(self, file: IO[bytes], is_current: Callable[[], bool]) -> None:
        self._file, self._is_current = file, is_current
        self._sha = hashlib.sha256()
        self._writeback = EarlyWriteback(file.fileno(), file.tell())
        self._waiting: list[bytes] = []
        self._writing: asyncio.Task[None] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that has been hashed."""
        return self._sha.hexdigest()

    def hash_existing(self, path: Path) -> None:
        """Hash the part of the file that an earlier request wrote."""
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                self._sha.update(piece)

    async def write(self, piece: bytes) -> None:
        """Queue the next bytes. Raises OSError if earlier bytes could not be written."""
        if self._writing is None and len(piece) <= _SMALL_BYTES:
            self._write([piece])
            return
        self._waiting.append(piece)
        UploadWriter._total_bytes += len(piece)
        is_full = UploadWriter._total_bytes > _MAX_WAITING_BYTES
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_waiting())
        elif is_full or self._writing.done() or len(self._waiting) >= _MAX_WAITING:
            await self.flush()

    async def flush(self) -> None:
        """Write everything that is queued, without fsync. Raises OSError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                await writing
            finally:
                rest = self._take_waiting()
            self._write(rest)

    def write_now(self, piece: memoryview) -> None:
        """Write the next bytes in this thread, after a `flush`. Raises OSError."""
        self._write([piece])

    def _take_waiting(self) -> list[bytes]:
        taken, self._waiting = self._waiting, []
        UploadWriter._total_bytes -= sum(map(len, taken))
        return taken

    async def _write_waiting(self) -> None:
        while self._waiting:
            await asyncio.to_thread(self._write, self._take_waiting())

    def _write(self, batch: Sequence[bytes | memoryview]) -> None:
        for piece in batch:
            if not self._is_current():
                return
            self._sha.update(piece)
            write_all(self._file, memoryview(piece))
            self._writeback.wrote(len(piece))


class WholeFileResponse(Response):
    """Sends a whole file. Starlette's FileResponse uses a thread for each 64 KB."""

    #: Files that are being sent.
    _num_sending = 0

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(size)
        self._path, self._size = path, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        WholeFileResponse._num_sending += 1
        try:
            with self._path.open("rb", buffering=0) as file:
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
                await self._send_body(file, connection_of(scope), send)
        finally:
            WholeFileResponse._num_sending -= 1

    async def _send_body(
        self, file: IO[bytes], connection: LimitedHttpProtocol | None, send: Send
    ) -> None:
        left, size = self._size, _PIECE_BYTES
        while left > 0:
            if size == _PIECE_BYTES and WholeFileResponse._num_sending > _FEW_FILES:
                size = _MANY_PIECE_BYTES
                if connection is not None:
                    connection.transport.set_write_buffer_limits(size)
            if not (piece := file.read(min(left, size))):
                return  # the file is shorter than announced: uvicorn closes the connection
            left -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
            await asyncio.sleep(0)
