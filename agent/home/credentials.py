"""The keys of this agent and the CA that it trusts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from agent.home.enrollment_file import Enrollment
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.identity import NodeKey, SigningKey
from protocols.network import addresses
from protocols.p2p.peer_addresses import is_loopback


class Credentials(NamedTuple):
    """The keys of this agent, and the coordinator's address and CA certificate.

    `fleet`: named in requests as their receiver; empty for an older coordinator. `others`: more
    addresses of the coordinator, which are tried when `address` does not answer.
    """

    address: str
    ca_pem: bytes
    peer: str
    node_key: NodeKey
    sign_key: SigningKey
    fleet: str = ""
    others: tuple[str, ...] = ()

    @classmethod
    def load(cls, home: Path, enrollment: Enrollment) -> Credentials:
        """Load the credentials of an enrolled home. Raises HomeError."""
        return cls(
            address=enrollment.addresses[0],
            ca_pem=enrollment.ca_pem.encode(),
            peer=enrollment.peer,
            node_key=identity.load_node_key(home / "node.key"),
            sign_key=identity.load_signing_key(home / "sign.key"),
            # A coordinator that sends a card reads requests that name a receiver.
            fleet=enrollment.fleet if enrollment.card else "",
            others=enrollment.addresses[1:],
        )

    @property
    def is_local_fleet(self) -> bool:
        """True if the coordinator is on this machine. Its peers may be there, too."""
        return is_loopback(addresses.parse(self.address).host)

    def sign_request(
        self, method: str, path: str, body_sha256: str = signed_requests.EMPTY_SHA256
    ) -> dict[str, str]:
        """The headers that sign one request to the coordinator."""
        return self.sign_request_to(self.fleet, method, path, body_sha256)

    def sign_request_to(
        self, receiver: str, method: str, path: str, body_sha256: str
    ) -> dict[str, str]:
        """The headers that sign one request to this peer or fleet."""
        return signed_requests.sign_headers(
            self.peer, self.sign_key.sign, method, path, body_sha256, receiver
        )
