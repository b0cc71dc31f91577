"""HTTP/1.1 connections with limits on time and size.

A response leaves in pieces through the event loop. A large body that arrives is decrypted, hashed
and written in a thread (`tls_offload`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coordinator.transport import tls_offload
from coordinator.transport.tls_offload import OffloadedConnection

#: Time for a whole request head, and grace for a body that falls below `MIN_BYTES_PER_S`.
READ_TIMEOUT_S = 15.0
MIN_BYTES_PER_S = 1024
#: Time in which a client must read some of the response that waits for it.
WRITE_TIMEOUT_S = 120.0
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
#: Requests that a client may send before it has the response to an earlier one.
MAX_PIPELINED = 16
#: The rest of a body is discarded, up to these limits, after an early response. A client that is
#: still sending reads the response only then.
MAX_DISCARDED_BYTES = 1024**3
DISCARD_TIMEOUT_S = 60.0
#: The extension of a request's scope that holds its connection.
_EXTENSION = "commonweight"


def connection_of(scope: Scope) -> LimitedHttpProtocol | None:
    """The connection of a request, if a server of ours received it."""
    extension = scope.get("extensions", {}).get(_EXTENSION, {})
    connection: LimitedHttpProtocol | None = extension.get("connection")
    return connection


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. `is_overdue` tells whether the client has missed its present deadline."""

    _head_bytes = 0
    _header_count = 0
    _in_body = False
    _discarded_bytes = 0
    _deadline = float("inf")
    _write_paused_at: float | None = None
    _is_offloaded = _is_slow_sender = False
    #: True while a new parser reads the made-up head of a request that is under way.
    _is_replacing_parser = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = time.monotonic() + READ_TIMEOUT_S

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._in_body:
            if not self._head_bytes and not self._is_responding():
                self._deadline = now + READ_TIMEOUT_S  # further bytes do not extend it
            self._head_bytes += len(data)
            # The piece that ends the head may hold body bytes too, hence the margin.
            if self._head_bytes > MAX_HEAD_BYTES + 256 * 1024:
                self.transport.abort()
                return
        elif self._is_responding():
            earned_s = len(data) / MIN_BYTES_PER_S
            self._deadline = min(now + READ_TIMEOUT_S, self._deadline + earned_s)
        else:
            if not self._discarded_bytes:
                self._deadline = now + DISCARD_TIMEOUT_S
            self._discarded_bytes += len(data)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
                return
        super().data_received(data)

    # An exception in one of these callbacks stops the parser, and uvicorn responds with 400.

    def on_message_begin(self) -> None:
        if self._is_replacing_parser:
            return
        self._header_count, self._is_slow_sender = 0, False
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: {"connection": self}}

    def on_url(self, url: bytes) -> None:
        if not self._is_replacing_parser:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_replacing_parser:
            return
        self._header_count += 1
        if self._header_count > MAX_HEADERS:
            raise ValueError("the request has too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_replacing_parser:
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise ValueError("the request head is too long")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many pipelined requests")
        self._head_bytes, self._in_body, self._discarded_bytes = 0, True, 0
        self._deadline = time.monotonic() + READ_TIMEOUT_S
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body, self._discarded_bytes = False, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._write_paused_at = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._write_paused_at = None
        super().resume_writing()

    def _is_responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def is_overdue(self, now: float) -> bool:
        """True if the client has sent too little, or read nothing, for too long."""
        if self._is_offloaded:  # the thread's limits are stricter
            return False
        if self._write_paused_at is not None:
            return now - self._write_paused_at > WRITE_TIMEOUT_S
        if self._is_responding():
            if self.flow.read_paused:  # the server does not read now: the client is not late
                self._deadline = now + READ_TIMEOUT_S
            return self.cycle.more_body and now > self._deadline
        if self._in_body:
            return now > self._deadline
        # uvicorn itself closes a connection that stays idle between two requests.
        is_idle = self.timeout_keep_alive_task is not None and not self._head_bytes
        return not is_idle and now > self._deadline

    def is_idle(self) -> bool:
        """True if no request is in progress and every response has been sent."""
        return not self._is_responding() and not self.transport.get_write_buffer_size()

    # --- bodies received in a thread ---

    def can_offload(self, left: int) -> bool:
        """True if a thread should receive the next of the `left` bytes of a body."""
        is_large = left >= tls_offload.MIN_BYTES and not self._is_slow_sender
        return is_large and tls_offload.can_offload(self.transport)

    async def receive_in_thread(self, left: int, write: Callable[[memoryview], None]) -> int:
        """Pass the next of the `left` bytes of the body to `write` in a thread; returns how many.

        0 if the event loop should receive them. Raises what `write` raises.
        """
        received_bytes, has_begun = 0, False

        def receive(connection: OffloadedConnection) -> None:
            nonlocal received_bytes, has_begun
            parsed, self.cycle.body = self.cycle.body, bytearray()
            received_bytes, has_begun = len(parsed), True
            write(memoryview(parsed))
            try:
                connection.receive(min(left - received_bytes, tls_offload.MAX_BYTES), write)
            finally:
                received_bytes += connection.received_bytes

        self._is_offloaded = True
        self.transport.pause_reading()
        # Let asyncio finish what it has scheduled for this connection.
        await asyncio.sleep(0)
        began = time.monotonic()
        try:
            if self.can_offload(left):
                size = await tls_offload.offload(self.transport, receive)
                self._is_slow_sender = tls_offload.is_slow(size, time.monotonic() - began)
        finally:
            self._is_offloaded = False
            self._deadline = time.monotonic() + READ_TIMEOUT_S
            if not (self.flow.read_paused or self.transport.is_closing()):
                self.transport.resume_reading()
            if has_begun and not self.transport.is_closing():
                self._replace_parser(left - received_bytes)
        return received_bytes

    def _replace_parser(self, left: int) -> None:
        """The parser has missed a part of the body: make one that expects the `left` bytes."""
        self._is_replacing_parser = True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"PUT / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % left)
        self._is_replacing_parser = False
        # The TLS layer may hold decrypted bytes: reading again passes them on.
        self.flow.resume_reading()
        self.transport.pause_reading()
        self.transport.resume_reading()
