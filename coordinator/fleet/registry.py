"""Enrollment: tickets, peers and operators, from the ledger's "fleet" entries.

Each change is an event (`fleet_events`): it is appended to the ledger, then applied. A ticket's
secret is stored as a hash. A peer's id comes from its Ed25519 key.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Set

import msgspec
from msgspec.structs import replace

from coordinator.fleet import fleet_events
from coordinator.fleet.fleet_events import (
    AnswersRead,
    CaFollowed,
    FleetEvent,
    KeyRotated,
    OperatorJoined,
    OperatorRemoved,
    PeerApproved,
    PeerJoined,
    PeerRemoved,
    Restored,
    TicketCreated,
    TicketRevoked,
)
from coordinator.fleet.members import Operator, Peer, TicketRole, TicketState
from coordinator.storage.ledger import Ledger, until_answers
from protocols.enrollment import identity, names
from protocols.enrollment.joining import (
    JoinRequest,
    OperatorJoinRequest,
    join_proof,
    operator_join_proof,
)
from protocols.enrollment.tickets import Ticket, hash_secret
from protocols.errors import BadMessage, CannotBeMet, Refused, UnknownName
from protocols.network import version_check


class Registry:
    """The members of the fleet. `on_change(peer)` is called after a peer's standing changed, and
    `on_operator_change(operator)` after an operator or observer joined or was removed."""

    def __init__(self, ledger: Ledger, *, approve: bool = False) -> None:
        self._ledger = ledger
        self._approve = approve
        self.tickets: dict[str, TicketState] = {}
        self.peers: dict[str, Peer] = {}
        self.operators: dict[str, Operator] = {}
        #: Peers and operators that have not come since the last rotation of the CA.
        self.behind: set[str] = set()
        self._epoch = 0
        #: What was read today: day, operator and what.
        self._read: set[tuple[int, str, str]] = set()
        self.on_change: Callable[[Peer], None] = lambda peer: None
        self.on_operator_change: Callable[[Operator], None] = lambda operator: None
        #: The last entry that `follow` has applied.
        self._seq = 0
        self.follow()

    def follow(self) -> None:
        """Apply what the ledger has since the last call, for a reader beside its writer.

        Raises LedgerUnreachable.
        """
        for entry in self._ledger.entries(fleet_events.SUBJECT, after=self._seq):
            self._apply(fleet_events.decode(entry.body))
            self._seq = entry.seq

    async def until_writable(self) -> None:
        """Wait until the ledger answers, before a change. Raises LedgerUnreachable."""
        await until_answers(self._ledger)

    def create_ticket(
        self,
        ticket: Ticket,
        *,
        ttl_s: float,
        uses: int,
        label: str = "",
        role: TicketRole = "agent",
    ) -> None:
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

    def join(self, request: JoinRequest) -> Peer:
        """Enroll a machine that has a ticket. Raises Refused, and BadMessage for a wrong key."""
        identity.check_node_public(request.node_public)
        proof = join_proof(request.ticket, request.secret, request.node_public)
        ticket = self._verified_ticket(request, proof)
        if ticket.role != "agent":
            raise Refused(
                f"this ticket is for an {ticket.role}, not for an agent",
                "commonweight monitor --join; for an agent: commonweight ticket create",
            )
        peer_id = identity.peer_id(request.sign_public)
        if known := self.peers.get(peer_id):
            if known.standing == "removed":
                raise Refused("this machine's key was removed", "join again with --replace")
            return known  # a retry: the response to the first request was lost
        _check_valid(ticket)
        version_check.check_compatible(request.version, "the agent on that machine")
        # Flower accepts a node key once, even a removed one. A second would fail every start.
        if any(peer.node_public == request.node_public for peer in self.peers.values()):
            raise Refused("another machine has this node key", "join again with --replace")
        taken = {peer.name for peer in self.peers.values() if peer.standing != "removed"}
        self._record(
            PeerJoined(
                peer=peer_id,
                name=_free_name(request.name, taken),
                labels=names.normalize_labels(request.labels),
                sign_public=request.sign_public,
                node_public=request.node_public,
                ticket=ticket.id,
                standing="awaiting" if self._approve else "enrolled",
            )
        )
        return self.peers[peer_id]

    def join_operator(self, request: OperatorJoinRequest) -> Operator:
        """Give access to a person who has a ticket with a role. Raises Refused, BadMessage."""
        proof = operator_join_proof(request.ticket, request.secret, request.sign_public)
        ticket = self._verified_ticket(request, proof)
        if ticket.role == "agent":
            raise Refused(
                "this ticket is for an agent, not for an operator or observer",
                "commonweight ticket create --role observer",
            )
        _check_valid(ticket)
        operator_id = identity.peer_id(request.sign_public)
        taken = {
            one.name
            for one in self.operators.values()
            if not one.removed and one.operator != operator_id
        }
        self._record(
            OperatorJoined(
                operator=operator_id,
                name=_free_name(request.name, taken),
                sign_public=request.sign_public,
                role=ticket.role,
                ticket=ticket.id,
            )
        )
        return self.operators[operator_id]

    def remove_operator(self, name_or_id: str) -> None:
        """Refuse this access from now on. Raises UnknownName."""
        for operator in self.operators.values():
            if not operator.removed and name_or_id in (operator.operator, operator.name):
                self._record(OperatorRemoved(operator.operator))
                return
        raise UnknownName(f"no operator {name_or_id!r}", "commonweight admin operators list")

    def _verified_ticket(
        self, request: JoinRequest | OperatorJoinRequest, proof: bytes
    ) -> TicketState:
        """The ticket in a request whose key signed `proof`."""
        if not identity.verify(request.sign_public, request.proof, proof):
            raise BadMessage("the request is not signed by the key that it names")
        ticket = self.tickets.get(request.ticket)
        secret_hash = hash_secret(request.ticket, request.secret)
        if ticket is None or not hmac.compare_digest(ticket.secret_hash, secret_hash):
            raise Refused("the coordinator does not know this ticket", "ask for a new ticket")
        return ticket

    def approve(self, peer_id: str) -> Peer:
        """Enroll a peer that awaits approval. Raises UnknownName."""
        peer = self.find(peer_id)
        self._record(PeerApproved(peer.peer))
        return self.peers[peer.peer]

    def remove(self, peer_id: str, because: str) -> None:
        """Refuse this key from now on. Raises UnknownName."""
        self._record(PeerRemoved(self.find(peer_id).peer, because))

    def find(self, name_or_id: str) -> Peer:
        """A peer that was not removed, by id or name. Raises UnknownName."""
        peers = [peer for peer in self.peers.values() if peer.standing != "removed"]
        for field in ("peer", "name"):  # ids first: a machine may choose another's id as its name
            for peer in peers:
                if getattr(peer, field) == name_or_id:
                    return peer
        raise UnknownName(f"no peer {name_or_id!r}", "commonweight peers list")

    def enrolled(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.standing == "enrolled"]

    def check_quorum(self, quorum: int) -> None:
        """Raise CannotBeMet unless the enrolled peers can meet this quorum."""
        num_enrolled = len(self.enrolled())
        if not 1 <= quorum <= max(num_enrolled, 1):
            raise CannotBeMet(
                f"a quorum of {quorum} cannot be met: {num_enrolled} enrolled",
                "lower --quorum, or let more machines join first",
            )

    def verify(self, peer_id: str, signature: bytes, message: bytes) -> bool:
        """True if this peer signed `message` and was not removed."""
        peer = self.peers.get(peer_id)
        if peer is None or peer.standing == "removed":
            return False
        return identity.verify(peer.sign_public, signature, message)

    def record_key(self, key: str, sha256: str) -> None:
        """Record that a key of the coordinator is replaced."""
        self._record(KeyRotated(key, sha256))

    async def note_ca(self, member: str) -> None:
        """Record that a member trusts the new CA: it got a certificate, or came over its TLS.

        Raises LedgerUnreachable.
        """
        if member in self.behind:
            await self.until_writable()
        if member in self.behind:  # another request may have recorded it during the wait
            self._record(CaFollowed(member))

    def has_read(self, operator: str, what: str) -> bool:
        """Whether `record_read` has nothing to record."""
        return (int(time.time() // 86400), operator, what) in self._read

    def record_read(self, operator: str, what: str) -> None:
        """Record who read an answer, once a day."""
        today = int(time.time() // 86400)
        self._read = {one for one in self._read if one[0] == today}
        if (today, operator, what) not in self._read:
            self._record(AnswersRead(operator=operator, what=what))
            self._read.add((today, operator, what))

    def record_restore(self, entries: int, made_at: float) -> None:
        """Record that this home was restored from a backup."""
        # The clock keeps the epoch growing when one backup is restored twice.
        epoch = max(self._epoch + 1, int(time.time()))
        self._record(Restored(epoch=epoch, entries=entries, made_at=made_at))

    def ticket_of(self, peer_id: str) -> str:
        """The id of the ticket that a peer joined with; its own id if that is not known."""
        known = self.peers.get(peer_id)
        return (known.ticket if known else "") or peer_id

    def _record(self, event: FleetEvent) -> None:
        self._ledger.append(fleet_events.SUBJECT, [fleet_events.encode(event)])
        self._apply(event)
        if isinstance(event, PeerJoined | PeerApproved | PeerRemoved):
            self.on_change(self.peers[event.peer])
        elif isinstance(event, OperatorJoined | OperatorRemoved):
            self.on_operator_change(self.operators[event.operator])

    def _apply(self, event: FleetEvent) -> None:
        match event:
            case TicketCreated():
                fields = msgspec.structs.asdict(event)
                self.tickets[event.id] = TicketState(uses_left=fields.pop("uses"), **fields)
            case TicketRevoked():
                self.tickets[event.id] = replace(self.tickets[event.id], revoked=True)
            case PeerJoined():
                self.peers[event.peer] = msgspec.convert(event, Peer, from_attributes=True)
                self._use_ticket(event.ticket)
            case OperatorJoined():
                operator = msgspec.convert(event, Operator, from_attributes=True)
                self.operators[event.operator] = operator
                self._use_ticket(event.ticket)
            case OperatorRemoved():
                operator = self.operators[event.operator]
                self.operators[event.operator] = replace(operator, removed=True)
                self.behind.discard(event.operator)
            case KeyRotated(key="ca"):
                self.behind = {p.peer for p in self.peers.values() if p.standing != "removed"}
                self.behind |= {one.operator for one in self.operators.values() if not one.removed}
            case CaFollowed(member=member):
                self.behind.discard(member)
            case PeerApproved():
                self.peers[event.peer] = replace(self.peers[event.peer], standing="enrolled")
            case PeerRemoved():
                self.peers[event.peer] = replace(self.peers[event.peer], standing="removed")
                self.behind.discard(event.peer)
            case Restored():
                self._epoch = event.epoch

    def _use_ticket(self, ticket_id: str) -> None:
        if ticket := self.tickets.get(ticket_id):
            self.tickets[ticket_id] = replace(ticket, uses_left=ticket.uses_left - 1)


def _free_name(wanted: str, taken: Set[str]) -> str:
    """The name in its one form, with a number if another has it. Raises Refused."""
    name = names.normalize(wanted)
    names.check_free(name, taken)
    free, number = name, 2
    while free in taken:
        free, number = f"{name[:56]}-{number}", number + 1
    return free


def _check_valid(ticket: TicketState) -> None:
    for is_invalid, reason in (
        (ticket.revoked, "was revoked"),
        (ticket.uses_left <= 0, "was used already"),
        (time.time() > ticket.expires_at, "has expired"),
    ):
        if is_invalid:
            raise Refused(f"this ticket {reason}", "ask for a new one: commonweight ticket create")
