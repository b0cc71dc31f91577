"""The events of the fleet in the ledger: tickets, members, keys, restores and offered tasks."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from coordinator.fleet.members import Peer, Role, TicketRole
from protocols.messages.offers import Offer

SUBJECT = "fleet"


class TicketCreated(Struct, frozen=True, tag=True, kw_only=True):
    id: str
    secret_hash: str
    expires_at: float
    uses: int
    label: str = ""
    role: TicketRole = "agent"


class TicketRevoked(Struct, frozen=True, tag=True):
    id: str


class PeerJoined(Peer, frozen=True, tag=True, kw_only=True):
    """A machine has joined."""


class PeerApproved(Struct, frozen=True, tag=True):
    peer: str


class PeerRemoved(Struct, frozen=True, tag=True):
    peer: str
    because: str


class OperatorJoined(Struct, frozen=True, tag=True, kw_only=True):
    operator: str
    name: str
    sign_public: bytes
    role: Role
    ticket: str


class OperatorRemoved(Struct, frozen=True, tag=True):
    operator: str


class KeyRotated(Struct, frozen=True, tag=True):
    """The coordinator's key of this name was replaced by one with this short hash."""

    key: str
    sha256: str


class CaFollowed(Struct, frozen=True, tag=True):
    """The peer or operator `member` trusts the CA since the last rotation."""

    member: str


class Restored(Struct, frozen=True, tag=True, kw_only=True):
    """The home was restored from a backup with `entries` entries, made `made_at` a time (Unix s).

    `epoch` grows with each restore: agents tell a restored coordinator from one that shows two
    versions (`storage.version_log`).
    """

    epoch: int
    entries: int
    made_at: float


class AnswersRead(Struct, frozen=True, tag=True, kw_only=True):
    """An operator read what single peers answered or logged, or exported a version.

    `operator`: an id, or "operator" for the key in this home. Recorded once a day for each `what`.
    """

    operator: str
    what: str


class TaskOffered(Struct, frozen=True, tag=True, kw_only=True):
    """An operator offered a task file, with its bytes. `number`: that of the list since then."""

    number: int
    offer: Offer
    operator: str
    data: bytes


class TaskWithdrawn(Struct, frozen=True, tag=True, kw_only=True):
    """An operator withdrew the offer of this name."""

    number: int
    name: str
    digest: str
    operator: str


FleetEvent = (
    TicketCreated
    | TicketRevoked
    | PeerJoined
    | PeerApproved
    | PeerRemoved
    | OperatorJoined
    | OperatorRemoved
    | KeyRotated
    | CaFollowed
    | Restored
    | AnswersRead
    | TaskOffered
    | TaskWithdrawn
)

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(FleetEvent).decode
