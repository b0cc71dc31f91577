"""One HTTP connection: what the other side may send, and by when. Large bodies go to a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import IO

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coordinator.transport import tls_offload
from coordinator.transport.tls_offload import Lent

#: For the head of a request, and for a body that does not keep up `MIN_BYTES_PER_S`.
PATIENCE_S = 15.0
MIN_BYTES_PER_S = 1024
#: For a reader that takes nothing of what it asked for.
READER_PATIENCE_S = 120.0
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
#: Requests sent ahead of the answer to the one before.
MAX_PIPELINED = 16
#: What may still come of a body after its request was answered, so that its sender reads why.
MAX_UNWANTED_BYTES = 1024**3
UNWANTED_S = 60.0
#: Where an endpoint finds the connection that its request came on.
_HERE = "commonweight"


def connection_of(scope: Scope) -> Doorkeeper | None:
    """The connection of a request, where it is one of ours."""
    found: Doorkeeper | None = scope.get("extensions", {}).get(_HERE, {}).get("connection")
    return found


class Doorkeeper(HttpToolsProtocol):
    """One connection, with a time by which the other side must have done its part (`_due`)."""

    _head_bytes = 0
    _num_headers = 0
    _in_body = False
    _unwanted = 0
    _due = float("inf")
    _stuck_since: float | None = None
    _is_lent = _is_slow = _is_catching_up = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._due = time.monotonic() + PATIENCE_S

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._in_body:
            if not self._head_bytes and not self._is_answering():
                self._due = now + PATIENCE_S  # for the whole head: a drop now and then is too slow
            self._head_bytes += len(data)
            # Counts the piece that holds the head's end as well: hence a generous limit.
            if self._head_bytes > MAX_HEAD_BYTES + 256 * 1024:
                self.transport.abort()
                return
        elif self._is_answering():
            self._due = min(now + PATIENCE_S, self._due + len(data) / MIN_BYTES_PER_S)
        else:
            # A body goes on after its request was refused: only then can the other side read why.
            if not self._unwanted:
                self._due = now + UNWANTED_S
            self._unwanted += len(data)
            if self._unwanted > MAX_UNWANTED_BYTES:
                self.transport.abort()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        if self._is_catching_up:
            return
        self._num_headers, self._is_slow = 0, False
        super().on_message_begin()
        self.scope["extensions"] = {_HERE: {"connection": self}}

    def on_url(self, url: bytes) -> None:
        if not self._is_catching_up:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_catching_up:
            return
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise ValueError("too many headers")  # the parser stops, and uvicorn answers 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_catching_up:
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")
        self._head_bytes, self._in_body, self._unwanted = 0, True, 0
        self._due = time.monotonic() + PATIENCE_S
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body, self._unwanted = False, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._stuck_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck_since = None
        super().resume_writing()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def is_overdue(self, now: float) -> bool:
        """True if the other side owes us bytes, or the reading of ours, for too long."""
        if self._is_lent:  # the thread has less patience
            return False
        if self._stuck_since is not None:
            return now - self._stuck_since > READER_PATIENCE_S
        if self._is_answering():
            if self.flow.read_paused:  # our own back-pressure: its time begins anew
                self._due = now + PATIENCE_S
            # Once the body is in it is our turn.
            return self.cycle.more_body and now > self._due
        if self._in_body:
            return now > self._due
        idle_between_requests = self.timeout_keep_alive_task is not None and not self._head_bytes
        return not idle_between_requests and now > self._due

    def is_idle(self) -> bool:
        return not self._is_answering() and not self.transport.get_write_buffer_size()

    # --- bodies in a thread ---

    def can_be_lent(self, left: int) -> bool:
        """True if a thread should move the next of `left` bytes of a body."""
        return (
            left >= tls_offload.LEAST_BYTES
            and not self._is_slow
            and tls_offload.is_free(self.transport)
        )

    async def take(self, left: int, put: Callable[[memoryview], None]) -> int:
        """Have a thread give what comes of the present body to `put`; how many bytes of `left`.

        0 where the loop should go on. Raises what `put` raises.
        """
        if not self.can_be_lent(left):
            return 0
        moved, lent_it = 0, False

        def work(connection: Lent) -> None:
            nonlocal moved, lent_it
            here, self.cycle.body = self.cycle.body, bytearray()  # is parsed already
            moved, lent_it = len(here), True
            put(memoryview(here))
            try:
                connection.read(min(left - moved, tls_offload.MOST_BYTES), put)
            finally:
                moved += connection.moved

        try:
            await self._lend(work)
        finally:
            if lent_it and not self.transport.is_closing():
                self._go_on_with(left - moved)
        return moved

    async def give(self, file: IO[bytes], left: int) -> int:
        """Have a thread send what comes next of a file as body; how many bytes of `left`.

        0 where the loop should go on.
        """
        if not self.can_be_lent(left):
            return 0
        moved = 0

        def work(connection: Lent) -> None:
            nonlocal moved
            connection.write(file, min(left, tls_offload.MOST_BYTES))
            moved = connection.moved

        await self._lend(work)
        self.cycle.expected_content_length -= moved
        return moved

    async def _lend(self, work: Callable[[Lent], None]) -> None:
        """Have it done, unless the connection cannot be lent after all."""
        self._is_lent = True
        self.transport.pause_reading()
        # What asyncio was about to do with the connection comes first, and finds it paused.
        await asyncio.sleep(0)
        began = time.monotonic()
        try:
            if tls_offload.is_free(self.transport):
                moved = await tls_offload.lend(self.transport, work)
                self._is_slow = tls_offload.is_slow(moved, time.monotonic() - began)
        finally:
            self._is_lent = False
            self._due = time.monotonic() + PATIENCE_S
            if not (self.flow.read_paused or self.transport.is_closing()):
                self.transport.resume_reading()

    def _go_on_with(self, left: int) -> None:
        """The parser has missed a part of the body: make one that waits for the rest of it."""
        self._is_catching_up = True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"PUT / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % left)
        self._is_catching_up = False
        # What came meanwhile is in the hands of TLS: this has it looked at.
        self.flow.resume_reading()
        self.transport.pause_reading()
        self.transport.resume_reading()
