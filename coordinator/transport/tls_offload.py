"""A TLS connection of the event loop, lent to a thread for as long as a large body flows.

asyncio's TLS moves 64 KB at a time, through five copies and all of it in the loop's thread: twice
what the bytes themselves take. A thread moves 256 KB, and two connections keep two cores busy. The
loop touches nothing of a connection while it is lent, and has it back as soon as nothing flows: so
its patience with slow senders and readers is what it was.

asyncio has no public way to this. Where what is needed here is not found (another Python, uvloop,
Windows' proactor) nothing is lent, and the loop moves the bytes as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

#: For less it is not worth the trouble.
LEAST_BYTES = 1024 * 1024
#: At a time: what is promised and counted of a body is looked at again after that.
MOST_BYTES = 64 * 1024 * 1024
#: With so many connections at a time; others stay with the loop.
_THREADS = 4
_PIECE_BYTES = 256 * 1024
#: Back to the loop after so long without a byte, or when after that time it was slower than this.
_QUIET_S = 0.05
_LOOK_AFTER_S, _LEAST_BYTES_PER_S = 0.25, 8 * 1024 * 1024

_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lent")
_busy = 0


class Lent:
    """A connection in a thread's hands. `leftover` is encrypted and has still to be sent."""

    def __init__(self, transport: Any) -> None:
        tls = transport._ssl_protocol
        self._raw: asyncio.Transport = tls._transport
        self._tls: ssl.SSLObject = tls._sslobj
        self._incoming: ssl.MemoryBIO = tls._incoming
        self._outgoing: ssl.MemoryBIO = tls._outgoing
        self._socket: socket.socket = self._raw.get_extra_info("socket").dup()
        self._began = time.monotonic()
        self.moved = 0
        self.leftover = b""
        self.given_up = False
        self._raw.pause_reading()

    def read(self, most: int, put: Callable[[memoryview], None]) -> None:
        """Give up to `most` bytes that come to `put`; `moved` counts them."""
        plain, cipher = (memoryview(bytearray(_PIECE_BYTES)) for _ in range(2))
        while self.moved < most:
            wanted = min(len(plain), most - self.moved)
            got, ended = self._decrypted(plain[:wanted])
            self.moved += got
            if got:
                put(plain[:got])
            if ended or (got < wanted and not self._fetched(cipher)):
                return

    def write(self, file: IO[bytes], most: int) -> None:
        """Send up to `most` bytes of the file; `moved` counts those that are encrypted."""
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while self.moved < most and not self.leftover:
            got = file.readinto(buffer[: min(len(buffer), most - self.moved)])  # type: ignore[attr-defined]
            if not got:
                return
            self._tls.write(buffer[:got])
            self.moved += got
            self._send(self._outgoing.read())

    def _decrypted(self, into: memoryview) -> tuple[int, bool]:
        """Bytes that have come and are decrypted, and whether the other side has ended."""
        got = 0
        with contextlib.suppress(ssl.SSLWantReadError):
            while got < len(into):
                count = self._tls.read(len(into) - got, into[got:])
                if not count:
                    return got, True
                got += int(count)
        return got, False

    def _fetched(self, buffer: memoryview) -> bool:
        """Take more from the wire; False when the loop should wait for it."""
        while True:
            try:
                got = self._socket.recv_into(buffer)
            except BlockingIOError:
                if self._flows(select.POLLIN):
                    continue
                return False
            self._incoming.write(buffer[:got])
            return got > 0

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                if not self._flows(select.POLLOUT):
                    self.leftover = bytes(view)
                    return

    def _flows(self, event: int) -> bool:
        """Wait a moment for the other side; False if it is slow, or nobody wants this any more."""
        lasted = time.monotonic() - self._began
        if self.given_up or is_slow(self.moved, lasted):
            return False
        poll = select.poll()
        poll.register(self._socket, event)
        return bool(poll.poll(1000 * _QUIET_S))

    def end(self) -> None:
        """Back in the loop: send what is left, and go on reading."""
        self._socket.close()
        if self._raw.is_closing():
            return
        if self.leftover:
            self._raw.write(self.leftover)
        self._raw.resume_reading()


async def lend(transport: Any, work: Callable[[Lent], None]) -> int:
    """Have `work` done in a thread with this connection, which `is_free`; the bytes it moved.

    Raises what `work` raises; a broken connection is closed. A caller that is cancelled waits for
    the thread.
    """
    global _busy
    lent = Lent(transport)
    _busy += 1
    working = asyncio.get_running_loop().run_in_executor(_threads, work, lent)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        lent.given_up = True
        await asyncio.wait({working})
        raise
    except (ssl.SSLError, ConnectionError):
        transport.abort()
    finally:
        _busy -= 1
        lent.end()
    return lent.moved


def is_slow(moved: int, lasted: float) -> bool:
    """True for a connection that the loop serves as well."""
    return lasted > _LOOK_AFTER_S and moved < lasted * _LEAST_BYTES_PER_S


def is_free(transport: Any) -> bool:
    """True for a TLS connection of asyncio's selector loop that has sent all, and a free thread."""
    if _busy >= _THREADS or sys.platform == "win32" or not hasattr(select, "poll"):
        return False
    tls = getattr(transport, "_ssl_protocol", None)
    raw: Any = getattr(tls, "_transport", None)
    parts = (raw, *(getattr(tls, name, None) for name in ("_sslobj", "_incoming", "_outgoing")))
    if any(part is None for part in parts) or not hasattr(raw, "_read_ready"):
        return False
    if transport.is_closing() or raw.is_closing():
        return False
    return not transport.get_write_buffer_size() and not raw.get_write_buffer_size()
