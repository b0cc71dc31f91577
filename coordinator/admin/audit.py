"""The audit: who joined, was removed or refused, and what the operator did, from the ledger.

It only reads the ledger, also while the coordinator runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from coordinator.fleet import fleet_events
from coordinator.fleet.auth import OPERATOR
from coordinator.fleet.fleet_events import FleetEvent
from coordinator.storage import run_events
from coordinator.storage.ledger import Ledger
from protocols.errors import UnknownName
from protocols.privacy import accountant
from protocols.privacy.events import Gaussian

#: The events of runs that the audit shows. Most others are skipped by their tag, without decoding.
_RUN_TAGS = frozenset(
    {"RunStarted", "RunEnded", "RunResumed", "RunDeleted", "UpdateRefused", "PrivacySpent"}
)


class _Tag(Struct):
    type: str


_tag = msgspec.json.Decoder(_Tag)


class AuditEntry(Struct, frozen=True, kw_only=True):
    """Entry `seq` of the ledger, of Unix time `at`, as text for a person.

    `peer` is an id, and `name` the name of that machine when it joined.
    """

    seq: int
    at: float
    event: str
    text: str
    peer: str = ""
    name: str = ""
    ticket: str = ""
    run: str = ""
    reason: str = ""


def read_audit(ledger: Ledger, *, peer: str = "", since: float = 0.0) -> list[AuditEntry]:
    """The entries of one peer (id or name) or of all, since a Unix time, oldest first.

    A name means every machine that ever had it. Raises UnknownName.
    """
    names: dict[str, str] = {}
    found = list(_read(ledger, names))
    if peer:
        wanted = {one for one, name in names.items() if peer in (one, name)}
        if not wanted:
            raise UnknownName(f"no peer {peer!r} ever joined", "commonweight admin audit")
        found = [line for line in found if line.peer in wanted]
    return [line for line in found if line.at >= since]


class _Spending:
    """What the versions with noise for whole peers have cost so far, in each run and in all."""

    def __init__(self) -> None:
        self._deltas: dict[str, float] = {}
        self._events: dict[str, list[Gaussian]] = {}

    def add(self, run: str, event: run_events.RunEvent) -> None:
        if isinstance(event, run_events.RunStarted):
            self._deltas[run] = event.spec.dp_delta
        elif isinstance(event, run_events.PrivacySpent):
            self._events.setdefault(run, []).append(Gaussian(event.noise))

    def text(self, run: str) -> str:
        """The cost of a run and of all until now; empty for a run without such noise."""
        if run not in self._events:
            return ""
        delta, own = self._deltas[run], self._events[run]
        together = [event for events in self._events.values() for event in events]
        cost, of_all = (accountant.epsilon_of(events, delta) for events in (own, together))
        return (
            f"; {len(own)} versions with noise for whole peers cost ε {cost:.3g}, and those of all "
            f"runs until then ε {of_all:.3g}, at δ {delta:g}"
        )


def _read(ledger: Ledger, names: dict[str, str]) -> Iterator[AuditEntry]:
    spending = _Spending()
    for entry in ledger.entries():
        try:
            if entry.subject == fleet_events.SUBJECT:
                event = fleet_events.decode(entry.body)
                found = _from_fleet_event(event, entry.at, names)
            elif _tag.decode(entry.body).type in _RUN_TAGS:
                decoded = run_events.decode(entry.body)
                spending.add(entry.subject, decoded)
                if isinstance(decoded, run_events.PrivacySpent):
                    continue
                found = _from_run_event(decoded, entry.subject, names)
                if isinstance(decoded, run_events.RunEnded):
                    found["text"] += spending.text(entry.subject)
            else:
                continue
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as err:
            text = f"this entry of {entry.subject!r} cannot be read: {err}"
            found = {"event": "unreadable", "text": text}
        name = names.get(found.get("peer", ""), "")
        yield AuditEntry(seq=entry.seq, at=entry.at, name=name, **found)


def _from_fleet_event(event: FleetEvent, at: float, names: dict[str, str]) -> dict[str, str]:
    """The fields of the audit entry for an event of the fleet."""
    match event:
        case fleet_events.TicketCreated(id=ticket, uses=uses):
            machines = "one machine" if uses == 1 else f"{uses} machines"
            text = (
                f"ticket {ticket} for {machines}, valid for {(event.expires_at - at) / 3600:.3g} h"
            )
            text += f", {event.label!r}" if event.label else ""
            text += f", for an {event.role}" if event.role != "agent" else ""
            return {"event": "ticket made", "text": text, "ticket": ticket}
        case fleet_events.TicketRevoked(id=ticket):
            text = f"ticket {ticket} was revoked by the operator"
            return {"event": "ticket revoked", "text": text, "ticket": ticket}
        case fleet_events.PeerJoined(peer=peer, name=name, ticket=ticket):
            names[peer] = name
            what = "asked to join" if event.standing == "awaiting" else "joined"
            text = f"{name} ({peer}) {what} with ticket {ticket}"
            return {"event": what, "text": text, "peer": peer, "ticket": ticket}
        case fleet_events.OperatorJoined(operator=operator, name=name, role=role, ticket=ticket):
            names[operator] = name
            text = f"{name} ({operator}) may watch as {role}, ticket {ticket}"
            return {"event": f"{role} joined", "text": text, "ticket": ticket}
        case fleet_events.OperatorRemoved(operator=operator):
            text = f"the access of {_label(operator, names)} was removed"
            return {"event": "access removed", "text": text}
        case fleet_events.KeyRotated(key=key, sha256=sha256):
            return {"event": "key rotated", "text": f"the {key} key was replaced by {sha256}"}
        case fleet_events.CaFollowed(member=member):
            text = f"{_label(member, names)} uses the new CA"
            return {"event": "new CA", "text": text, "peer": member}
        case fleet_events.AnswersRead(operator=operator, what=what):
            text = f"{_operator(operator, names)}: {what}"
            return {"event": "answers read", "text": text}
        case fleet_events.Restored(entries=entries, made_at=made_at):
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(made_at))
            text = f"restored from a backup of {made}, which has {entries} entries"
            return {"event": "restored", "text": text}
        case fleet_events.TaskOffered(offer=offer, operator=operator):
            text = f"{_operator(operator, names)} offered {offer.name}, sha256 {offer.digest}"
            return {"event": "task offered", "text": text}
        case fleet_events.TaskWithdrawn(name=name, digest=digest, operator=operator):
            text = f"{_operator(operator, names)} withdrew {name}, sha256 {digest}"
            return {"event": "task withdrawn", "text": text}
        case fleet_events.PeerApproved(peer=peer):
            text = f"{_label(peer, names)} was approved by the operator"
            return {"event": "approved", "text": text, "peer": peer}
        case fleet_events.PeerRemoved(peer=peer, because=reason):
            text = f"{_label(peer, names)}: {reason}"
            return {"event": "removed", "text": text, "peer": peer, "reason": reason}


def _from_run_event(event: run_events.RunEvent, run: str, names: dict[str, str]) -> dict[str, str]:
    """The fields of the audit entry for an event of a run, one of `_RUN_TAGS`."""
    found = {"run": run}
    match event:
        case run_events.RunStarted(spec=spec):
            text = f"{run}: {spec.rounds} rounds of {spec.task}, {spec.strategy}"
            found |= {"event": "run started", "text": text}
        case run_events.RunEnded(state=state, because=reason):
            found |= {"event": f"run {state}", "text": f"{run}: {reason}", "reason": reason}
        case run_events.RunResumed():
            found |= {"event": "run resumed", "text": f"{run} was resumed"}
        case run_events.RunDeleted(versions=versions, nbytes=nbytes):
            text = f"{run}: {len(versions)} versions, {nbytes / 1e6:,.1f} MB in all"
            found |= {"event": "run deleted", "text": text}
        case run_events.UpdateRefused(peer=peer, reason=reason):
            detail = f" ({event.detail})" if event.detail else ""
            text = f"{_label(peer, names)}, {run} round {event.round}: {reason}{detail}"
            found |= {"event": "update refused", "text": text, "peer": peer, "reason": reason}
    return found


def _operator(operator: str, names: dict[str, str]) -> str:
    return "the operator of this home" if operator == OPERATOR else _label(operator, names)


def _label(peer: str, names: dict[str, str]) -> str:
    return f"{names[peer]} ({peer})" if peer in names else peer
