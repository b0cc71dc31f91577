"""Receives a large body over a TLS connection in a thread, while asyncio leaves it alone.

asyncio decrypts 64 KB at a time through five copies, all in the event loop's thread. A thread
decrypts, hashes and writes 256 KB at a time, and two threads use two cores. Two uploads of 40 MB at
once took 0.115 s with it and 0.157 s without. Downloads took the same time either way, so they stay
in the event loop (two cores, medians of nine).

asyncio has no public interface for this. If its internals differ (another event loop, a later
Python), `can_offload` is False and asyncio receives the body.
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
from typing import Any

#: Below this size, asyncio is as fast.
MIN_BYTES = 1024 * 1024
#: Received in one turn of a thread. Then the event loop checks again whether the upload may
#: continue.
MAX_BYTES = 64 * 1024 * 1024
_MAX_THREADS = 4
_PIECE_BYTES = 256 * 1024
#: A connection returns to the event loop after this time without data, or if its rate after
#: `_MEASURE_S` is below `_MIN_BYTES_PER_S`: a slow sender must not hold a thread.
_STALL_S = 0.05
_MEASURE_S, _MIN_BYTES_PER_S = 0.25, 8 * 1024 * 1024

_threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="tls-offload")
_busy = 0


class OffloadedConnection:
    """A connection that a thread uses. The event loop must not touch it until `give_back`."""

    def __init__(self, transport: Any) -> None:
        tls = transport._ssl_protocol
        self._raw: asyncio.Transport = tls._transport
        self._tls: ssl.SSLObject = tls._sslobj
        self._incoming: ssl.MemoryBIO = tls._incoming
        self._socket: socket.socket = self._raw.get_extra_info("socket").dup()
        self._began = time.monotonic()
        self.received_bytes = 0
        self.cancelled = False
        self._raw.pause_reading()

    def receive(self, max_bytes: int, write: Callable[[memoryview], None]) -> None:
        """Decrypt up to `max_bytes` and pass them to `write`, while the sender keeps up."""
        plain, cipher = (memoryview(bytearray(_PIECE_BYTES)) for _ in range(2))
        while self.received_bytes < max_bytes:
            wanted = min(len(plain), max_bytes - self.received_bytes)
            size, ended = self._decrypt(plain[:wanted])
            self.received_bytes += size
            if size:
                write(plain[:size])
            if ended or (size < wanted and not self._read_socket(cipher)):
                return

    def _decrypt(self, buffer: memoryview) -> tuple[int, bool]:
        """The number of bytes decrypted, and whether the client has closed the connection."""
        size = 0
        with contextlib.suppress(ssl.SSLWantReadError):
            while size < len(buffer):
                count = self._tls.read(len(buffer) - size, buffer[size:])
                if not count:
                    return size, True
                size += int(count)
        return size, False

    def _read_socket(self, buffer: memoryview) -> bool:
        """Read encrypted bytes; False if the event loop should wait for them."""
        while True:
            try:
                size = self._socket.recv_into(buffer)
            except BlockingIOError:
                if self._wait_readable():
                    continue
                return False
            self._incoming.write(buffer[:size])
            return size > 0

    def _wait_readable(self) -> bool:
        """Wait for the sender; False if it is too slow or the request was cancelled."""
        if self.cancelled or is_slow(self.received_bytes, time.monotonic() - self._began):
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(1000 * _STALL_S))

    def give_back(self) -> None:
        """Return the connection to the event loop."""
        self._socket.close()
        if not self._raw.is_closing():
            self._raw.resume_reading()


async def offload(transport: Any, work: Callable[[OffloadedConnection], None]) -> int:
    """Run `work` in a thread with this connection; returns the number of bytes it received.

    Raises what `work` raises; a broken connection is aborted instead. If the caller is cancelled,
    it waits for the thread.
    """
    global _busy
    connection = OffloadedConnection(transport)
    _busy += 1
    working = asyncio.get_running_loop().run_in_executor(_threads, work, connection)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        connection.cancelled = True
        await asyncio.wait({working})
        raise
    except (ssl.SSLError, ConnectionError):
        transport.abort()
    finally:
        _busy -= 1
        connection.give_back()
    return connection.received_bytes


def is_slow(nbytes: int, seconds: float) -> bool:
    """True for a transfer that asyncio serves as well."""
    return seconds > _MEASURE_S and nbytes < seconds * _MIN_BYTES_PER_S


def can_offload(transport: Any) -> bool:
    """True for a TLS connection of asyncio's selector loop, nothing to send, and a free thread."""
    if _busy >= _MAX_THREADS or sys.platform == "win32" or not hasattr(select, "poll"):
        return False
    tls = getattr(transport, "_ssl_protocol", None)
    raw: Any = getattr(tls, "_transport", None)
    parts = (raw, getattr(tls, "_sslobj", None), getattr(tls, "_incoming", None))
    if any(part is None for part in parts) or not hasattr(raw, "_read_ready"):
        return False
    if transport.is_closing() or raw.is_closing():
        return False
    return not transport.get_write_buffer_size() and not raw.get_write_buffer_size()
