"""Enrollment: tickets, peers and operators, as the fold of the ledger's "fleet" entries.

`Registry` is pure but for the ledger it appends to: every change is first a fact, then applied.
A ticket's secret is stored hashed; a peer is known by its Ed25519 key's id.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from coordinator.storage.ledger import Ledger
from protocols.enrollment import identity
from protocols.enrollment.joining import (
    JoinRequest,
    OperatorJoinRequest,
    join_proof,
    operator_join_proof,
)
from protocols.enrollment.tickets import Ticket, hash_secret
from protocols.errors import BadMessage, CannotBeMet, Refused, UnknownName
from protocols.network import version_check

SUBJECT = "fleet"
Role = Literal["observer", "operator"]
TicketRole = Literal["agent", "observer", "operator"]
EnrollmentStatus = Literal["awaiting", "enrolled", "removed"]


class TicketCreated(Struct, frozen=True, tag=True, kw_only=True):
    id: str
    secret_hash: str
    expires_at: float
    uses: int
    label: str = ""
    role: TicketRole = "agent"


class TicketRevoked(Struct, frozen=True, tag=True):
    id: str


class PeerJoined(Struct, frozen=True, tag=True, kw_only=True):
    peer: str
    name: str
    labels: dict[str, str]
    sign_public: bytes
    node_public: bytes
    ticket: str
    standing: EnrollmentStatus


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


FleetEvent = (
    TicketCreated
    | TicketRevoked
    | PeerJoined
    | PeerApproved
    | PeerRemoved
    | OperatorJoined
    | OperatorRemoved
)

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(FleetEvent).decode


class TicketState(Struct, frozen=True, kw_only=True):
    """A ticket as the coordinator knows it: never its secret."""

    id: str
    secret_hash: str
    expires_at: float
    uses_left: int
    label: str
    role: TicketRole = "agent"
    revoked: bool = False


class Peer(Struct, frozen=True, kw_only=True):
    """An enrolled machine."""

    peer: str
    name: str
    labels: dict[str, str]
    sign_public: bytes
    node_public: bytes
    standing: EnrollmentStatus


class Operator(Struct, frozen=True, kw_only=True):
    """Somebody who watches from another machine, and with the role operator may change things."""

    operator: str
    name: str
    sign_public: bytes
    role: Role
    removed: bool = False


class Registry:
    """Who belongs to the fleet. `on_change(peer)` is called after a peer's standing changed."""

    def __init__(self, ledger: Ledger, *, approve: bool = False) -> None:
        self._ledger = ledger
        self._approve = approve
        self.tickets: dict[str, TicketState] = {}
        self.peers: dict[str, Peer] = {}
        self.operators: dict[str, Operator] = {}
        self.on_change: Callable[[Peer], None] = lambda peer: None
        for entry in ledger.entries(SUBJECT):
            self._apply(_decode(entry.body))

    def create_ticket(
        self,
        ticket: Ticket,
        *,
        ttl_s: float,
        uses: int,
        label: str = "",
        role: TicketRole = "agent",
    ) -> None:
        """Remember a new ticket by its hash."""
        self._record(
            TicketCreated(
                id=ticket.id,
                secret_hash=hash_secret(ticket.id, ticket.secret),
                expires_at=time.time() + ttl_s,
                uses=uses,
                label=label,
                role=role,
            )
        )

    def revoke_ticket(self, ticket_id: str) -> None:
        """Raises UnknownName."""
        if ticket_id not in self.tickets:
            raise UnknownName(f"no ticket {ticket_id!r}", "commonweight ticket list")
        self._record(TicketRevoked(ticket_id))

    def join(self, joining: JoinRequest) -> Peer:
        """Enroll a machine against its ticket. Raises Refused; BadMessage for a wrong key."""
        identity.check_node_public(joining.node_public)
        signed = join_proof(joining.ticket, joining.secret, joining.node_public)
        if not identity.verify(joining.sign_public, joining.proof, signed):
            raise BadMessage("the request is not signed by the key that it names")
        ticket = self._known_ticket(joining.ticket, joining.secret)
        if ticket.role != "agent":
            raise Refused(
                f"this ticket is for an {ticket.role}, not for an agent",
                "commonweight monitor --join; for an agent: commonweight ticket create",
            )
        peer_id = identity.peer_id(joining.sign_public)
        known = self.peers.get(peer_id)
        if known is not None and known.standing == "removed":
            raise Refused("this machine's key was removed", "join again with --replace")
        if known is not None:  # the answer to its first try was lost: the ticket is spent already
            return known
        _check_unspent(ticket)
        version_check.check_compatible(joining.version, "the agent on that machine")
        # Flower takes a node key once, also one that was removed: a second would fail every start.
        if any(peer.node_public == joining.node_public for peer in self.peers.values()):
            raise Refused("another machine has this node key", "join again with --replace")
        self._record(
            PeerJoined(
                peer=peer_id,
                name=self._free_name(joining.name),
                labels=joining.labels,
                sign_public=joining.sign_public,
                node_public=joining.node_public,
                ticket=ticket.id,
                standing="awaiting" if self._approve else "enrolled",
            )
        )
        return self.peers[peer_id]

    def join_operator(self, joining: OperatorJoinRequest) -> Operator:
        """Give somebody access against a ticket with a role. Raises Refused, BadMessage."""
        signed = operator_join_proof(joining.ticket, joining.secret, joining.sign_public)
        if not identity.verify(joining.sign_public, joining.proof, signed):
            raise BadMessage("the request is not signed by the key that it names")
        ticket = self._known_ticket(joining.ticket, joining.secret)
        if ticket.role == "agent":
            raise Refused(
                "this ticket lets an agent join, and nobody watch",
                "commonweight ticket create --role observer",
            )
        _check_unspent(ticket)
        operator_id = identity.peer_id(joining.sign_public)
        self._record(
            OperatorJoined(
                operator=operator_id,
                name=joining.name,
                sign_public=joining.sign_public,
                role=ticket.role,
                ticket=ticket.id,
            )
        )
        return self.operators[operator_id]

    def remove_operator(self, name_or_id: str) -> None:
        """Refuse this access from now on. Raises UnknownName."""
        for one in self.operators.values():
            if not one.removed and name_or_id in (one.operator, one.name):
                self._record(OperatorRemoved(one.operator))
                return
        raise UnknownName(f"no operator {name_or_id!r}", "commonweight operators list")

    def _known_ticket(self, ticket_id: str, secret: bytes) -> TicketState:
        ticket = self.tickets.get(ticket_id)
        given = hash_secret(ticket_id, secret)
        if ticket is None or not hmac.compare_digest(ticket.secret_hash, given):
            raise Refused("the coordinator does not know this ticket", "ask for a new ticket")
        return ticket

    def approve(self, peer_id: str) -> Peer:
        """Let a waiting peer in. Raises UnknownName."""
        peer = self.find(peer_id)
        self._record(PeerApproved(peer.peer))
        return self.peers[peer.peer]

    def remove(self, peer_id: str, because: str) -> None:
        """Refuse this key from now on. Raises UnknownName."""
        self._record(PeerRemoved(self.find(peer_id).peer, because))

    def find(self, name_or_id: str) -> Peer:
        """A peer that was not removed, by id or name. Raises UnknownName."""
        here = [peer for peer in self.peers.values() if peer.standing != "removed"]
        for peer in here:
            if peer.peer == name_or_id:
                return peer
        for peer in here:  # after the ids: a machine may call itself by another's
            if peer.name == name_or_id:
                return peer
        raise UnknownName(f"no peer {name_or_id!r}", "commonweight peers list")

    def enrolled(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.standing == "enrolled"]

    def check_quorum(self, quorum: int) -> None:
        """Raises CannotBeMet for one that the peers enrolled now can never meet."""
        there = len(self.enrolled())
        if not 1 <= quorum <= max(there, 1):
            raise CannotBeMet(
                f"a quorum of {quorum} cannot be met: {there} enrolled",
                "lower --quorum, or let more machines join first",
            )

    def verify(self, peer_id: str, signature: bytes, message: bytes) -> bool:
        """True if an enrolled or waiting peer of this id signed `message`."""
        peer = self.peers.get(peer_id)
        if peer is None or peer.standing == "removed":
            return False
        return identity.verify(peer.sign_public, signature, message)

    def _free_name(self, name: str) -> str:
        taken = {peer.name for peer in self.peers.values() if peer.standing != "removed"}
        free, number = name, 2
        while free in taken:
            free, number = f"{name[:56]}-{number}", number + 1
        return free

    def _record(self, event: FleetEvent) -> None:
        self._ledger.append(SUBJECT, [_encode(event)])
        self._apply(event)
        if isinstance(event, PeerJoined | PeerApproved | PeerRemoved):
            self.on_change(self.peers[event.peer])

    def _apply(self, event: FleetEvent) -> None:
        match event:
            case TicketCreated():
                self.tickets[event.id] = TicketState(
                    id=event.id,
                    secret_hash=event.secret_hash,
                    expires_at=event.expires_at,
                    uses_left=event.uses,
                    label=event.label,
                    role=event.role,
                )
            case TicketRevoked():
                self.tickets[event.id] = replace(self.tickets[event.id], revoked=True)
            case PeerJoined():
                self.peers[event.peer] = Peer(
                    peer=event.peer,
                    name=event.name,
                    labels=event.labels,
                    sign_public=event.sign_public,
                    node_public=event.node_public,
                    standing=event.standing,
                )
                self._spend(event.ticket)
            case OperatorJoined():
                self.operators[event.operator] = Operator(
                    operator=event.operator,
                    name=event.name,
                    sign_public=event.sign_public,
                    role=event.role,
                )
                self._spend(event.ticket)
            case OperatorRemoved():
                one = self.operators[event.operator]
                self.operators[event.operator] = replace(one, removed=True)
            case PeerApproved():
                self.peers[event.peer] = replace(self.peers[event.peer], standing="enrolled")
            case PeerRemoved():
                self.peers[event.peer] = replace(self.peers[event.peer], standing="removed")

    def _spend(self, ticket_id: str) -> None:
        if ticket := self.tickets.get(ticket_id):
            self.tickets[ticket_id] = replace(ticket, uses_left=ticket.uses_left - 1)


def _check_unspent(ticket: TicketState) -> None:
    for used, why in (
        (ticket.revoked, "was revoked"),
        (ticket.uses_left <= 0, "was used already"),
        (time.time() > ticket.expires_at, "has expired"),
    ):
        if used:
            raise Refused(f"this ticket {why}", "ask for a new one: commonweight ticket create")
