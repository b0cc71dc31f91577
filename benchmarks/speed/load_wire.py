"""Minimal HTTPS and MQTT clients for thousands of simulated agents in one process."""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from asyncio import sslproto
from collections.abc import Callable
from typing import NamedTuple

# asyncio gives each TLS connection a read buffer of this size.
sslproto.SSLProtocol.max_size = 32 * 1024


class Answer(NamedTuple):
    status: int
    body: bytes


class Http:
    """A keep-alive connection, reopened after `expiry_s` without use, like httpx.

    `source`: the IP address that it comes from; empty for the usual one.
    """

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext, expiry_s: float, source: str = ""
    ) -> None:
        self._host, self._port, self._tls, self._expiry_s = host, port, tls, expiry_s
        self._source = (source, 0) if source else None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0
        self._lock = asyncio.Lock()

    async def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Raises OSError, IncompleteReadError."""
        async with self._lock:
            reader, writer = await self._open()
            head = [f"{method} {path} HTTP/1.1", f"host: {self._host}:{self._port}"]
            head += [f"{name}: {value}" for name, value in headers.items()]
            head.append(f"content-length: {len(body)}")
            try:
                writer.write("\r\n".join((*head, "", "")).encode() + body)
                answer = await _answer(reader)
            except BaseException:
                self.close()
                raise
            self._used = time.monotonic()
            return answer

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams and time.monotonic() - self._used > self._expiry_s:
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                self._host, self._port, ssl=self._tls, local_addr=self._source
            )
        return self._streams

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
        self._streams = None


async def _answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    length = next(
        (int(line[15:]) for line in head if line.lower().startswith("content-length:")), 0
    )
    return Answer(int(head[0].split()[1]), await reader.readexactly(length) if length else b"")


class Mqtt:
    """One MQTT 3.1.1 session: a will, one subscription, publishing at QoS 1, pings."""

    def __init__(self, on_message: Callable[[bytes], None]) -> None:
        self._on_message = on_message
        self._number = 1
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(
        self,
        where: tuple[str, int, ssl.SSLContext],
        login: tuple[str, str],
        client_id: str,
        will: tuple[str, bytes],
        keepalive_s: int,
        topic: str,
        source: str = "",
    ) -> None:
        """Log in and subscribe to `topic`. Raises OSError, IncompleteReadError."""
        host, port, tls = where
        self._reader, self._writer = await asyncio.open_connection(
            host, port, ssl=tls, local_addr=(source, 0) if source else None
        )
        # User, password, retained will at QoS 1, clean session.
        body = _text("MQTT") + bytes((4, 0b11101110)) + struct.pack(">H", keepalive_s)
        body += _text(client_id) + _text(will[0]) + _bytes(will[1])
        self._send(0x10, body + _text(login[0]) + _text(login[1]))
        kind, answer = await self._packet()
        if kind != 0x20 or answer[1]:
            raise ConnectionError(f"the broker refused the login ({answer!r})")
        self._send(0x82, struct.pack(">H", self._next()) + _text(topic) + b"\x01")
        self._tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._ping())]
        self._ping_s = keepalive_s * 0.8

    def publish(self, topic: str, payload: bytes) -> None:
        """Send a retained message at QoS 1, without waiting for its acknowledgment."""
        self._send(0x33, _text(topic) + struct.pack(">H", self._next()) + payload)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._writer is not None:
            self._writer.close()

    def _next(self) -> int:
        self._number = self._number % 65_535 + 1
        return self._number

    def _send(self, first: int, body: bytes) -> None:
        length, size = b"", len(body)
        while True:
            size, low = size >> 7, size & 0x7F
            length += bytes((low | (0x80 if size else 0),))
            if not size:
                break
        assert self._writer is not None, "connect comes first"
        self._writer.write(bytes((first,)) + length + body)

    async def _packet(self) -> tuple[int, bytes]:
        first = (await self._reader.readexactly(1))[0]
        size, shift = 0, 0
        while True:
            byte = (await self._reader.readexactly(1))[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return first, await self._reader.readexactly(size) if size else b""

    async def _hear(self) -> None:
        while True:
            first, body = await self._packet()
            if first >> 4 != 3:  # an acknowledgment or the answer to a ping
                continue
            end = 2 + struct.unpack(">H", body[:2])[0]
            if first & 0x06:
                self._send(0x40, body[end : end + 2])
                end += 2
            self._on_message(body[end:])

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._ping_s)
            self._send(0xC0, b"")


def _text(text: str) -> bytes:
    return _bytes(text.encode())


def _bytes(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
