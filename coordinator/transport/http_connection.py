"""HTTP/1.1 connections with limits on time and size.

A large body stays in the event loop: uvicorn moves it in pieces, and a worker thread hashes and
writes what arrives (`streams`). Two alternatives were measured over TLS on two busy cores. A thread
that took the TLS connection over from asyncio gained nothing; this way took, as the median of 9 to
21 alternating pairs, the following multiple of its time (one transfer, two at once):

    download of 40 MB  0.94, 0.98      of 400 MB  0.95, 1.06
    upload of 40 MB    0.92, 0.84      of 400 MB  0.68, 0.61

granian was mostly faster: 0.34 to 1.04 of that thread's time for one transfer, 0.36 to 1.41 for
two. But its embedded server is experimental. It accepts connections itself, so that none can be
refused by address, and it has no limit for a slow body.
"""

from __future__ import annotations

import asyncio
import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. `is_overdue` tells whether the client has missed its present deadline."""

    _head_bytes = 0
    _header_count = 0
    _in_body = False
    _discarded_bytes = 0
    _deadline = float("inf")
    _write_paused_at: float | None = None

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
        self._header_count = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > MAX_HEADERS:
            raise ValueError("the request has too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
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
