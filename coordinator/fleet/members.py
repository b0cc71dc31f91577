"""Peers, operators and their tickets, as the registry stores them."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from protocols.messages.envelope import PeerChanged

Role = Literal["observer", "operator"]
TicketRole = Literal["agent", "observer", "operator"]
EnrollmentStatus = Literal["awaiting", "enrolled", "removed"]


class Peer(Struct, frozen=True, kw_only=True):
    """A machine that joined."""

    peer: str
    name: str
    labels: dict[str, str]
    sign_public: bytes
    node_public: bytes
    standing: EnrollmentStatus
    #: The id of the ticket that it joined with.
    ticket: str = ""

    def changed(self, *, has_session: bool) -> PeerChanged:
        """What monitors get of it: its identity, and whether it has a session."""
        return PeerChanged(
            peer=self.peer,
            name=self.name,
            labels=self.labels,
            enrollment=self.standing,
            public_key=self.sign_public,
            has_session=has_session,
        )


class TicketState(Struct, frozen=True, kw_only=True):
    """A ticket without its secret."""

    id: str
    secret_hash: str
    expires_at: float
    uses_left: int
    label: str
    role: TicketRole = "agent"
    revoked: bool = False


class Operator(Struct, frozen=True, kw_only=True):
    """A person with access from another machine. Only the role `operator` may change things."""

    operator: str
    name: str
    sign_public: bytes
    role: Role
    removed: bool = False
