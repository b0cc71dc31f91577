"""The HTTPS server: uvicorn, with the patience of a doorkeeper.

A stranger costs little and not for long: a TLS handshake, a request's head and each piece of its
body have a time limit, a head has a size limit, and one address can hold so many connections and no
more. uvicorn alone waits for ever on a connection that says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from protocols.errors import PortInUse, UsageFault

HANDSHAKE_S = 10.0
#: For the head of a request, and between two pieces of its body.
PATIENCE_S = 15.0
MAX_HEAD_BYTES = 32 * 1024
#: Many honest agents may share one address behind a router.
MAX_PER_ADDRESS = 4096
_SWEEP_S = 1.0


class Doorkeeper(HttpToolsProtocol):
    """One connection. `held` counts the connections of each address, for the whole process."""

    held: ClassVar[Counter[str]] = Counter()
    _address = ""
    _head_bytes = 0
    _in_body = False
    _heard_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._heard_at = time.monotonic()
        self.held[self._address] += 1
        if self.held[self._address] > MAX_PER_ADDRESS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.held[self._address] -= 1
        if self.held[self._address] <= 0:
            del self.held[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        # A body goes on after its request was refused: only then can the other side read why.
        if not self._in_body:
            self._head_bytes += len(data)
            # Counts the piece that holds the head's end as well: hence a generous limit.
            if self._head_bytes > MAX_HEAD_BYTES + 256 * 1024:
                self.transport.abort()
                return
        super().data_received(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if sum(len(n) + len(v) for n, v in self.headers) > MAX_HEAD_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._head_bytes, self._in_body = 0, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def is_overdue(self, now: float) -> bool:
        """True if the other side owes us bytes for too long."""
        if now - self._heard_at <= PATIENCE_S:
            return False
        if self._is_answering():
            # Our turn once the body is in; a paused transport is our own back-pressure.
            return self.cycle.more_body and not self.flow.read_paused
        idle_between_requests = self.timeout_keep_alive_task is not None
        return not idle_between_requests

    def is_idle(self) -> bool:
        return not self._is_answering() and not self.transport.get_write_buffer_size()


class Server(uvicorn.Server):
    """uvicorn over an open socket, without signal handlers: the hub decides when to stop."""

    def __init__(self, app: ASGIApp, listener: socket.socket, certificate: Path, key: Path) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Doorkeeper,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=2,
            )
        )
        self._listener = listener
        self._files = (certificate, key)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self.renew()

    def renew(self) -> None:
        """Read the certificate again; connections made from now on see it."""
        self._tls.load_cert_chain(*self._files)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self._connection,
            sock=self._listener,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=2.0,
            backlog=2048,
        )
        self.servers.append(server)

    def _connection(self) -> Doorkeeper:
        return Doorkeeper(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's own clock, ten times a second."""
        if counter % int(_SWEEP_S * 10) == 0:
            now = time.monotonic()
            for connection in self._doors():
                if connection.is_overdue(now):
                    connection.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving. An idle client never answers the farewell of TLS, so it gets none."""
        for connection in self._doors():
            if connection.is_idle():
                connection.transport.abort()
        await super().shutdown(sockets)

    def _doors(self) -> list[Doorkeeper]:
        return [c for c in self.server_state.connections if isinstance(c, Doorkeeper)]

    async def up(self, serving: asyncio.Task[None]) -> None:
        """Wait until it answers, or has failed."""
        while not self.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event)
            await asyncio.sleep(0.01)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises PortInUse, UsageFault."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; without it, each answer
    # waits 40 ms for a delayed acknowledgement between its head and its body.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name != "nt":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as err:
        listener.close()
        if err.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} of {host} is in use", "choose another: --port") from err
        hint = "choose another: --host"
        raise UsageFault(f"cannot listen on {host}:{port}: {err.strerror or err}", hint) from err
    listener.setblocking(False)
    return listener


def allow_many_connections() -> None:
    """Lift the limit of open files as far as the system lets us."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
