"""The HTTPS server: uvicorn with limits on connections, time and size.

uvicorn alone waits without a limit for a client that sends nothing. Here each TLS handshake,
request head and body has a deadline (`http_connection`), and each address has a limit on open
connections and on new connections a second. Both count from the first packet, before the TLS
handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import time
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.transport.http_connection import LimitedHttpProtocol
from coordinator.transport.ports import listen_error

HANDSHAKE_TIMEOUT_S = 10.0
#: Many agents, with two connections each, may share one address behind a router.
MAX_PER_CLIENT = 4096
#: New connections of one client: a burst, then a rate. A handshake takes about 1 ms of CPU.
MAX_NEW_BURST, MAX_NEW_PER_S = 4096, 256
MAX_CONNECTIONS = 16_384
#: A response with one of these closes the connection, so that the next attempt counts as a new
#: one. 409, 413 and 422 are missing: a peer reads them while it is still sending its upload.
CLOSE_AFTER = frozenset({400, 401, 403, 404, 405, 411})
_CHECK_EVERY_S = 1.0

# Each TLS connection allocates a read buffer of this size at its first packet. With asyncio's
# 256 KB, 300 half-open connections take 97 MB. A TLS record has at most 16 KB.
sslproto.SSLProtocol.max_size = 64 * 1024


class TrackedSocket(socket.socket):
    """An accepted connection that calls `on_close` once."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()
        super().close()


class RateLimitedListener(socket.socket):
    """A listening socket that closes connections of clients that are over a limit.

    It counts before the TLS handshake: a handshake that never ends is a connection too.
    """

    def __init__(self, family: socket.AddressFamily) -> None:
        # asyncio sets TCP_NODELAY on accepted sockets only if the protocol is named. Without it,
        # the body of each response waits 40 ms for the delayed acknowledgement of its head.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.max_connections = MAX_CONNECTIONS
        #: Open connections by client.
        self.open_connections: Counter[str] = Counter()
        self._total = 0
        #: By client: tokens left in its bucket, and when that was (monotonic s).
        self._buckets: dict[str, tuple[float, float]] = {}

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection within the limits. Raises BlockingIOError when there is none."""
        while True:
            accepted, address = super().accept()
            client = client_key(address[0])
            if not self._admit(client):
                accepted.close()
                continue
            tracked = TrackedSocket(self.family, self.type, self.proto, fileno=accepted.detach())
            self.open_connections[client] += 1
            self._total += 1
            tracked.on_close = lambda client=client: self._release(client)
            return tracked, address

    def _admit(self, client: str) -> bool:
        now = time.monotonic()
        tokens, at = self._buckets.get(client, (float(MAX_NEW_BURST), now))
        tokens = min(MAX_NEW_BURST, tokens + (now - at) * MAX_NEW_PER_S)
        self._buckets[client] = (max(tokens - 1, 0.0), now)
        has_room = (
            self.open_connections[client] < MAX_PER_CLIENT and self._total < self.max_connections
        )
        return tokens >= 1 and has_room

    def _release(self, client: str) -> None:
        self._total -= 1
        self.open_connections[client] -= 1
        if not self.open_connections[client]:
            del self.open_connections[client]

    def drop_full_buckets(self, now: float) -> None:
        """Forget clients without a connection whose bucket is full again."""
        refill_s = MAX_NEW_BURST / MAX_NEW_PER_S
        for client, (_, at) in list(self._buckets.items()):
            if now - at > refill_s and client not in self.open_connections:
                del self._buckets[client]


def client_key(host: str) -> str:
    """The unit that limits apply to: an IPv4 address, or the /64 network of an IPv6 address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


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


def raise_open_file_limit() -> int | None:
    """Raise the limit of open files as far as possible. Returns it, or None for no limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
