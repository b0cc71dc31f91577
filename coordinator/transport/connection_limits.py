"""Limits on the connections of each client, before any TLS handshake."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

#: Many agents, with two connections each, may share one address behind a router.
MAX_PER_CLIENT = 4096
#: New connections of one client: a burst, then a rate. A handshake takes about 1 ms of CPU.
MAX_NEW_BURST, MAX_NEW_PER_S = 4096, 256
MAX_CONNECTIONS = 16_384


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
        #: Those that need not hurry, by client; the others are bounded by `max_unsettled`.
        self.settled: Counter[str] = Counter()
        self.max_unsettled = MAX_PER_CLIENT
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
        count = self.open_connections[client]
        has_room = count < MAX_PER_CLIENT and self._total < self.max_connections
        return tokens >= 1 and has_room and count - self.settled[client] < self.max_unsettled

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
