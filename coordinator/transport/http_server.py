"""The HTTPS server: uvicorn with limits on connections, time and size.

uvicorn alone waits without a limit for a client that sends nothing. Here each TLS handshake,
request head and body has a deadline (`http_connection`), and each address has a limit on open
connections and on new connections a second. Both count from the first packet, before the TLS
handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from asyncio import sslproto
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.transport.connection_limits import (
    MAX_CONNECTIONS,
    RateLimitedListener,
    raise_open_file_limit,
)
from coordinator.transport.http_connection import LimitedHttpProtocol
from coordinator.transport.ports import listen_error

HANDSHAKE_TIMEOUT_S = 10.0
#: A response with one of these closes the connection, so that the next attempt counts as a new
#: one. 409, 413 and 422 are missing: a peer reads them while it is still sending its upload.
CLOSE_AFTER = frozenset({400, 401, 403, 404, 405, 411})
_CHECK_EVERY_S = 1.0

# Each TLS connection allocates a read buffer of this size at its first packet. With asyncio's
# 256 KB, 300 half-open connections take 97 MB. A TLS record has at most 16 KB.
sslproto.SSLProtocol.max_size = 64 * 1024


def _closing_after_refusal(app: ASGIApp) -> ASGIApp:
    """`app`, with `connection: close` in each response whose status is in `CLOSE_AFTER`."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_close(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in CLOSE_AFTER:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_or_close)

    return serve


class Server(uvicorn.Server):
    """uvicorn on a bound socket, without signal handlers: the coordinator decides when to stop."""

    def __init__(
        self, app: ASGIApp, listener: RateLimitedListener, certificate: Path, key: Path
    ) -> None:
        super().__init__(
            uvicorn.Config(
                _closing_after_refusal(app),
                http=LimitedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
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
        """Read the certificate files again. New connections use them."""
        self._tls.load_cert_chain(*self._files)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        max_files = raise_open_file_limit()
        if max_files is not None:
            # Leave a quarter of the open files for other uses.
            self._listener.max_connections = min(MAX_CONNECTIONS, max_files * 3 // 4)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self._new_protocol,
            sock=self._listener,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=2.0,
            backlog=2048,
        )
        self.servers.append(server)

    def _new_protocol(self) -> LimitedHttpProtocol:
        return LimitedHttpProtocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: closes connections that are overdue."""
        if counter % int(_CHECK_EVERY_S * 10) == 0:
            now = time.monotonic()
            for connection in self._protocols():
                if connection.is_overdue(now):
                    connection.transport.abort()
            self._listener.drop_full_buckets(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving. Idle connections are cut: an idle client does not answer a TLS shutdown."""
        for connection in self._protocols():
            if connection.is_idle():
                connection.transport.abort()
        await super().shutdown(sockets)

    def _protocols(self) -> list[LimitedHttpProtocol]:
        connections = self.server_state.connections
        return [c for c in connections if isinstance(c, LimitedHttpProtocol)]

    async def wait_started(self, serving: asyncio.Task[None]) -> None:
        """Wait until the server accepts connections or has failed."""
        while not self.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event)
            await asyncio.sleep(0.01)


def listen(host: str, port: int) -> RateLimitedListener:
    """Bind a socket that limits its clients. Raises PortInUse, UsageError."""
    listener = RateLimitedListener(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name != "nt":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as err:
        listener.close()
        raise listen_error(err, host, port) from err
    listener.setblocking(False)
    return listener
