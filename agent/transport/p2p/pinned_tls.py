"""A TLS connection that accepts exactly one node key."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from contextlib import suppress

from protocols.enrollment import identity
from protocols.errors import Refused
from protocols.p2p.swarm import host_of

_CONNECT_S = 3.0


class PinnedConnection(http.client.HTTPSConnection):
    """A connection to `address` (host:port). Connecting raises Refused for another key."""

    def __init__(self, address: str, node_public: bytes) -> None:
        port = int(address.rpartition(":")[2])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The pinned key authenticates the peer, not a CA. It is checked before the first request.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(host_of(address), port, timeout=_CONNECT_S, context=context)
        self._expected = node_public
        #: The deadline of the current request, in monotonic seconds.
        self.due = float("inf")

    def connect(self) -> None:
        super().connect()
        shown = self.sock.getpeercert(binary_form=True)
        if shown is None or not identity.certificate_matches_key(shown, self._expected):
            self.close()
            raise Refused("another machine answers at a peer's address")

    def end_if_overdue(self) -> None:
        """Aborts a request past its deadline; callable from another thread.

        A socket timeout alone never ends a peer that sends a byte now and then.
        """
        if time.monotonic() > self.due:
            self.end()

    def end(self) -> None:
        """Aborts the request; callable from another thread."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
