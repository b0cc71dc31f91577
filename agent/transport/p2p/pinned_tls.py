"""A TLS connection to whoever holds a node key, and to nobody else."""

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
    """A connection to `address` (host:port); connecting raises Refused if somebody else answers."""

    def __init__(self, address: str, node_public: bytes) -> None:
        port = int(address.rpartition(":")[2])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The key decides, not a name that a CA vouches for; it is looked at before we say a word.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(host_of(address), port, timeout=_CONNECT_S, context=context)
        self._expected = node_public
        #: When what is under way must be done (monotonic s).
        self.due = float("inf")

    def connect(self) -> None:
        super().connect()
        shown = self.sock.getpeercert(binary_form=True)
        if shown is None or not identity.certificate_matches_key(shown, self._expected):
            self.close()
            raise Refused("somebody else answers at a peer's address")

    def end_if_overdue(self) -> None:
        """Break off what takes too long, from another thread.

        A time-out of the socket alone never ends a peer that sends a byte now and then.
        """
        if time.monotonic() > self.due:
            self.end()

    def end(self) -> None:
        """Break off, from another thread."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
