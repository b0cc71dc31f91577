"""Replicas of the coordinator that wait, and send large versions in its place.

The fleet's CA signs their addresses. They get no other requests, and their bytes are checked by the
digest. After a failure, a replica is not used for a while: the coordinator sends the rest.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
import time
from collections.abc import Sequence

from agent.transport.http_client import HttpClient
from protocols.errors import BadWeights, CommonweightError

log = logging.getLogger("commonweight.agent")

#: Another connection costs more than a smaller version.
MIN_BYTES = 1 << 20
#: A download from a replica has at least this many times the rate at which the coordinator's is
#: given up.
MIN_SPEEDUP = 64
#: Without an answer, and after wrong bytes.
_REST_S, _LONG_REST_S = 120.0, 86400.0
_TIMEOUT_S, _IDLE_S = 15.0, 60.0


class DownloadReplica:
    """One of them. Any thread may use it."""

    def __init__(self, address: str, tls: ssl.SSLContext) -> None:
        self.address = address
        self.client = HttpClient((address,), tls, timeout_s=_TIMEOUT_S, max_idle_s=_IDLE_S)
        self.rests_until = 0.0

    def fail(self, err: CommonweightError) -> None:
        """Do not choose it for a while. The owner reads of wrong bytes in the log.

        An address that does not answer is usual: it is that of the replica that leads.
        """
        is_wrong = isinstance(err, BadWeights)
        self.rests_until = time.monotonic() + (_LONG_REST_S if is_wrong else _REST_S)
        level = logging.WARNING if is_wrong else logging.DEBUG
        log.log(level, "no download from the replica %s: %s", self.address, err.message)


class DownloadReplicas:
    """The replicas, in an order that depends on the peer, so that peers spread over them."""

    def __init__(self, peer: str, tls: ssl.SSLContext) -> None:
        self._peer, self._tls, self._is_closed = peer, tls, False
        self._replicas: tuple[DownloadReplica, ...] = ()

    def use(self, addresses: Sequence[str]) -> None:
        """Take these from now on."""
        known = {one.address: one for one in self._replicas}
        if known.keys() != set(addresses):
            ordered = sorted(set(addresses), key=self._place)
            self._replicas = tuple(
                known.get(one) or DownloadReplica(one, self._tls) for one in ordered
            )
            for one in set(known.values()).difference(self._replicas):
                one.client.close()

    def _place(self, address: str) -> bytes:
        return hashlib.sha256(f"{self._peer} {address}".encode()).digest()

    def choose(self, nbytes: int) -> DownloadReplica | None:
        """The one to download from, in place of the coordinator; None for a small version."""
        now = time.monotonic()
        if nbytes < MIN_BYTES or self._is_closed:
            return None
        return next((one for one in self._replicas if one.rests_until <= now), None)

    def drop_connections(self) -> None:
        """Closes all connections. New ones open on demand."""
        for one in self._replicas:
            one.client.drop_connections()

    def close(self) -> None:
        """Closes all connections for good."""
        self._is_closed = True
        for one in self._replicas:
            one.client.close()
