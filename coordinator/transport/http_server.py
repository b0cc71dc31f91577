"""The HTTPS server: uvicorn, with the patience of a doorkeeper.

A stranger costs little and not for long: a TLS handshake, a request's head and each piece of its
body have a time limit, a head has a size limit, and one address can hold so many connections and
make so many new ones, counted from their first packet on. uvicorn alone waits for ever on a
connection that says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
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

from coordinator.transport.http_connection import Doorkeeper
from protocols.errors import PortInUse, UsageFault

HANDSHAKE_S = 10.0
#: Many honest agents, two connections each, may share one address behind a router.
MAX_PER_ADDRESS = 4096
#: New connections: so many at once, then so many a second. A handshake costs about 1 ms of CPU.
NEW_AT_ONCE, NEW_PER_S = 4096, 256
MAX_CONNECTIONS = 16_384
#: Who is answered so loses the connection: what comes next counts as a new one. Not 409, 413, 422:
#: those tell a member what became of its upload, which it is still sending.
PARTING = frozenset({400, 401, 403, 404, 405, 411})
_SWEEP_S = 1.0

# Each TLS connection holds a read buffer of this size from its first packet on. asyncio's 256 KB
# make 300 half-open connections cost 97 MB; a TLS record has 16 KB.
sslproto.SSLProtocol.max_size = 64 * 1024


class Visitor(socket.socket):
    """An accepted connection that tells when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        told, self.on_close = self.on_close, None
        if told is not None:
            told()
        super().close()


class Listener(socket.socket):
    """A listening socket that turns away who has too many connections or makes them too fast.

    It counts from the first packet on: a TLS handshake that never ends is a connection too.
    """

    def __init__(self, family: socket.AddressFamily) -> None:
        # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; without it, each
        # answer waits 40 ms for a delayed acknowledgement between its head and its body.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.most = MAX_CONNECTIONS
        self.held: Counter[str] = Counter()
        self._total = 0
        #: By address: how many new connections it has left, and when that was so (monotonic s).
        self._allowance: dict[str, tuple[float, float]] = {}

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that may stay. Raises BlockingIOError when there is none."""
        while True:
            accepted, address = super().accept()
            who = household(address[0])
            if not self._may_enter(who):
                accepted.close()
                continue
            visitor = Visitor(self.family, self.type, self.proto, fileno=accepted.detach())
            self.held[who] += 1
            self._total += 1
            visitor.on_close = lambda who=who: self._left(who)
            return visitor, address

    def _may_enter(self, who: str) -> bool:
        now = time.monotonic()
        left, at = self._allowance.get(who, (float(NEW_AT_ONCE), now))
        left = min(NEW_AT_ONCE, left + (now - at) * NEW_PER_S)
        self._allowance[who] = (max(left - 1, 0.0), now)
        return left >= 1 and self.held[who] < MAX_PER_ADDRESS and self._total < self.most

    def _left(self, who: str) -> None:
        self._total -= 1
        self.held[who] -= 1
        if not self.held[who]:
            del self.held[who]

    def forget_old(self, now: float) -> None:
        """Drop what is known of addresses whose allowance is whole again."""
        whole_s = NEW_AT_ONCE / NEW_PER_S
        for who, (_, at) in list(self._allowance.items()):
            if now - at > whole_s and who not in self.held:
                del self._allowance[who]


def household(host: str) -> str:
    """Who counts as one: an IPv4 address, or the /64 that one line of IPv6 is given."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def _parting(app: ASGIApp) -> ASGIApp:
    """Ends the connection with an answer in `PARTING`."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def say(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in PARTING:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, say)

    return serve


class Server(uvicorn.Server):
    """uvicorn over an open socket, without signal handlers: the hub decides when to stop."""

    def __init__(self, app: ASGIApp, listener: socket.socket, certificate: Path, key: Path) -> None:
        super().__init__(
            uvicorn.Config(
                _parting(app),
                http=Doorkeeper,
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
        """Read the certificate again; connections made from now on see it."""
        self._tls.load_cert_chain(*self._files)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        if isinstance(self._listener, Listener):
            self._listener.most = _room()
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
            if isinstance(self._listener, Listener):
                self._listener.forget_old(now)
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
    listener = Listener(family)
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


def _room() -> int:
    """How many connections leave enough open files for all else."""
    try:
        import resource
    except ImportError:
        return MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft * 3 // 4)
    )
