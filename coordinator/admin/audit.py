"""The audit: who was let in, sent away or refused, and what the operator did, from the ledger.

Reads the file beside a coordinator that may be up, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from coordinator.fleet import registry
from coordinator.fleet.registry import FleetEvent
from coordinator.storage import run_events
from coordinator.storage.ledger import Entry, Ledger
from protocols.errors import NotRunning, UnknownName

LEDGER_FILE = "ledger.db"

_fleet_fact = msgspec.json.Decoder(FleetEvent)
#: Most entries are a run's everyday work: these are told by their tag before they are decoded.
_RUN_TAGS = frozenset({"RunStarted", "RunEnded", "RunResumed", "RunDeleted", "UpdateRefused"})


class _Tag(Struct):
    type: str


_tag = msgspec.json.Decoder(_Tag)


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One line of the audit: entry `seq` of the ledger, at `at` (Unix s).

    `peer` is an id and `name` what the machine was called when it joined; `text` is for a person.
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


def open_ledger(home: Path) -> Ledger:
    """The home's ledger, to be read only. Raises NotRunning, HomeError."""
    if not (home / LEDGER_FILE).exists():
        raise NotRunning(f"nothing has happened yet in {home}", "start it: commonweight up")
    return Ledger(home / LEDGER_FILE, read_only=True)


def read_audit(ledger: Ledger, *, peer: str = "", since: float = 0.0) -> list[AuditEntry]:
    """The audit, oldest first, of one peer (id or name) or all, from Unix s `since` on.

    A name stands for every machine that ever had it. Raises UnknownName.
    """
    names: dict[str, str] = {}
    found = list(_read(ledger, names))
    if peer:
        wanted = {one for one, name in names.items() if peer in (one, name)}
        if not wanted:
            raise UnknownName(f"no peer {peer!r} ever joined", "commonweight audit")
        found = [line for line in found if line.peer in wanted]
    return [line for line in found if line.at >= since]


def _read(ledger: Ledger, names: dict[str, str]) -> Iterator[AuditEntry]:
    for entry in ledger.entries():
        try:
            if entry.subject == registry.SUBJECT:
                yield _of_fleet(entry, _fleet_fact.decode(entry.body), names)
            elif _tag.decode(entry.body).type in _RUN_TAGS:
                yield _of_run(entry, run_events.decode(entry.body), names)
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as err:
            text = f"this entry of {entry.subject!r} cannot be read: {err}"
            yield AuditEntry(seq=entry.seq, at=entry.at, event="unreadable", text=text)


def _of_fleet(entry: Entry, fact: FleetEvent, names: dict[str, str]) -> AuditEntry:
    event, text, ticket, peer, reason = "", "", "", "", ""
    match fact:
        case registry.TicketCreated(id=ticket, uses=uses, label=label):
            event = "ticket made"
            machines = "one machine" if uses == 1 else f"{uses} machines"
            hours = (fact.expires_at - entry.at) / 3600
            text = f"ticket {ticket} for {machines}, good for {hours:.3g} h"
            text += f", {label!r}" if label else ""
            text += f", for an {fact.role}" if fact.role != "agent" else ""
        case registry.TicketRevoked(id=ticket):
            event, text = "ticket revoked", f"ticket {ticket} was revoked by the operator"
        case registry.PeerJoined(peer=peer, ticket=ticket):
            names[peer] = fact.name
            waits = fact.standing == "awaiting"
            event = "asked to join" if waits else "joined"
            text = f"{fact.name} ({peer}) {event} with ticket {ticket}"
        case registry.OperatorJoined(ticket=ticket):
            event = f"{fact.role} joined"
            names[fact.operator] = fact.name
            text = f"{fact.name} ({fact.operator}) may watch as {fact.role}, ticket {ticket}"
        case registry.OperatorRemoved():
            event = "access removed"
            text = f"the access of {_label(fact.operator, names)} was removed"
        case registry.PeerApproved(peer=peer):
            event = "approved"
            text = f"{_label(peer, names)} was approved by the operator"
        case registry.PeerRemoved(peer=peer, because=reason):
            event = "removed"
            text = f"{_label(peer, names)}: {reason}"
    return AuditEntry(
        seq=entry.seq,
        at=entry.at,
        event=event,
        text=text,
        peer=peer,
        name=names.get(peer, ""),
        ticket=ticket,
        reason=reason,
    )


def _of_run(entry: Entry, fact: run_events.RunEvent, names: dict[str, str]) -> AuditEntry:
    event, text, peer, reason, run = "", "", "", "", entry.subject
    match fact:
        case run_events.RunStarted(spec=spec):
            event = "run started"
            text = f"{run}: {spec.rounds} rounds of {spec.task}, {spec.strategy}"
        case run_events.RunEnded(state=state, because=reason):
            event, text = f"run {state}", f"{run}: {reason}"
        case run_events.RunResumed():
            event, text = "run resumed", f"{run} goes on"
        case run_events.RunDeleted(versions=versions, nbytes=nbytes):
            event = "run deleted"
            text = f"{run}: {len(versions)} versions, {nbytes / 1e6:,.1f} MB in all"
        case run_events.UpdateRefused(peer=peer, reason=reason):
            event = "update refused"
            detail = f" ({fact.detail})" if fact.detail else ""
            text = f"{_label(peer, names)}, {run} round {fact.round}: {reason}{detail}"
    return AuditEntry(
        seq=entry.seq,
        at=entry.at,
        event=event,
        text=text,
        peer=peer,
        name=names.get(peer, ""),
        run=run,
        reason=reason,
    )


def _label(peer: str, names: dict[str, str]) -> str:
    return f"{names[peer]} ({peer})" if peer in names else peer
