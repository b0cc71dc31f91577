"""A TLS connection to one peer: signed requests with a token, each with a time limit. Blocking."""

from __future__ import annotations

import hashlib
import http.client
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager

from agent.home.credentials import Credentials
from agent.transport.connection import Connection, map_errors
from protocols.enrollment import certificates
from protocols.network import addresses
from protocols.p2p import peer_addresses
from protocols.p2p.gossip import Neighbor
from protocols.p2p.swarm import PieceSource

_CONNECT_S = 3.0


class PeerConnection(Connection):
    """A connection to the address of `peer` that accepts only the key of this peer.

    `token_header` and `token` are sent with every request. A peer that sends nothing for `stall_s`
    has failed.
    """

    def __init__(
        self,
        peer: Neighbor | PieceSource,
        credentials: Credentials,
        token_header: str,
        token: bytes,
        *,
        stall_s: float,
    ) -> None:
        host, port, _ = addresses.parse(peer.address)
        super().__init__(host, port, certificates.pinned_context(), _CONNECT_S)
        self._peer, self._credentials = peer, credentials
        self._name = peer.name if isinstance(peer, Neighbor) else peer.peer
        self._stall_s = stall_s
        self._token = {token_header: b64encode(token).decode()}

    def connect(self) -> None:
        """Connects. Raises OSError, also if another key answers or no peer may be there."""
        address, is_local = self._peer.address, self._credentials.is_local_fleet
        if reason := peer_addresses.refusal(address, allow_loopback=is_local):
            raise OSError(f"no request is sent to {address}: {reason}")
        super().connect()
        certificate = self.sock.getpeercert(binary_form=True)
        if certificate is None or not certificates.certificate_matches_key(
            certificate, self._peer.node_public
        ):
            self.close()
            raise OSError("another machine answers at its address")
        self.sock.settimeout(self._stall_s)

    @contextmanager
    def exchange(
        self, method: str, path: str, within_s: float, body: bytes = b"", **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends a request; the `with` block reads the response. Raises Unreachable.

        After `within_s` the exchange is aborted. A socket timeout alone never ends a peer that
        sends a byte now and then.
        """
        receiver = self._peer.peer if self._peer.signs > 1 else ""
        digest = hashlib.sha256(body).hexdigest()
        signed = self._credentials.sign_request_to(receiver, method, path, digest)
        overdue = threading.Timer(within_s, self.end)
        overdue.daemon = True
        overdue.start()
        try:
            with map_errors(self._name):
                self.request(method, path, body or None, signed | self._token | headers)
                response = self.getresponse()
            yield response
        finally:
            overdue.cancel()

    def read(self, response: http.client.HTTPResponse, nbytes: int | None = None) -> bytes:
        """Reads up to `nbytes` of the body, at least one; or all of it. Raises Unreachable."""
        with map_errors(self._name):
            data = response.read(nbytes)
            if nbytes and not data:
                raise ConnectionError("it closed the connection")
        return data
