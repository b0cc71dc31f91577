"""A job as a pure state machine: events in, its state out. No I/O, no clock.

Rule 1. The state of a job is the fold of its events (`apply`); the ledger holds nothing else of it.
Rule 2. `scheduler.decide(job, available)` says what to do next.
Rule 3. An event that a unit's state does not admit (`ADMITS`) changes nothing.

    queued ──UnitLeased──> leased ──UnitReturned──> returned ──UnitVerified──> verified
      ^                      │                         │
      └──────LeaseEnded──────┴──────AnswerDropped──────┘

A unit has several leases at the end of a job, for a quorum, and after an overdue lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from functools import cached_property, reduce
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from coordinator.storage import job_events as events
from coordinator.storage.job_events import AnswerInfo, Block, JobEvent, JobSpec, JobState
from protocols.messages.envelope import MAX_PEERS, Integer, Time

#: `overdue`: other peers are asked too, and its answer still counts.
Lease = Literal["open", "overdue"]
T = TypeVar("T")
#: Bounds for operators, who decode jobs. The ledger may have any text.
_Line = Annotated[str, Meta(max_length=64 * 1024)]
_ByPeer = Annotated[dict[_Line, T], Meta(max_length=MAX_PEERS)]
OVERDUE, FAILED = "overdue", "failed"
#: The weight of a new measurement in the average of a peer's speed.
_RATE_WEIGHT = 0.5


class UnitState(StrEnum):
    QUEUED = "queued"
    LEASED = "leased"
    RETURNED = "returned"
    VERIFIED = "verified"


class Unit(Struct, frozen=True, kw_only=True, dict=True):
    """Blocks `first` up to `stop` of a scattered job, or all rows of one peer (`only`).

    `leases` and `answers` are by peer. `failed`: peers that could not do it. `verified`: the digest
    of the verified answer.
    """

    number: Integer
    first: Integer = 0
    stop: Integer = 0
    only: _Line = ""
    leases: _ByPeer[Lease] = {}
    answers: _ByPeer[AnswerInfo] = field(default_factory=dict, name="given")
    failed: Annotated[frozenset[_Line], Meta(max_length=MAX_PEERS)] = frozenset()
    verified: _Line = ""

    @property
    def state(self) -> UnitState:
        if self.verified:
            return UnitState.VERIFIED
        if self.answers:
            return UnitState.RETURNED
        return UnitState.LEASED if "open" in self.leases.values() else UnitState.QUEUED

    @property
    def answer(self) -> AnswerInfo:
        """The verified answer."""
        return next(found for found in self.answers.values() if found.digest == self.verified)

    @property
    def agreed(self) -> int:
        """How many peers gave the most common answer."""
        digests = [answer.digest for answer in self.answers.values()]
        return max(map(digests.count, digests), default=0)

    def without_lease(self, peer: str, **changes: Any) -> Unit:
        """The unit after a peer's lease has ended."""
        leases = {other: lease for other, lease in self.leases.items() if other != peer}
        return replace(self, **{"leases": leases} | changes)


class Job(Struct, frozen=True, kw_only=True, dict=True):
    """The state of a job.

    `rates` are rows a second by peer. `excused` gives the reason by peer; `dropped` counts answers
    by reason. `taken`: the requester has the answers. Times are Unix s, 0 if unknown.
    """

    id: _Line
    spec: JobSpec
    state: JobState = JobState.WORKING
    units: Annotated[dict[Integer, Unit], Meta(max_length=1 << 20)] = {}
    rates: _ByPeer[float] = {}
    excused: _ByPeer[_Line] = {}
    dropped: _ByPeer[Integer] = {}
    ended_because: _Line = ""
    taken: bool = False
    began_at: Time = 0.0
    ended_at: Time = 0.0

    @property
    def ended(self) -> bool:
        return self.state is not JobState.WORKING

    @property
    def is_scattered(self) -> bool:
        """True if any peer may do any unit; otherwise each peer does its own."""
        return self.spec.kind == "scatter"

    @cached_property
    def num_cut_blocks(self) -> int:
        """How many blocks belong to a unit already."""
        return max((unit.stop for unit in self.units.values()), default=0)

    @cached_property
    def num_cut_rows(self) -> int:
        """How many rows belong to a unit already."""
        return _count_rows(self.spec.blocks[: self.num_cut_blocks])

    def rows(self, unit: Unit) -> int:
        """Rows of a scattered unit."""
        return _count_rows(self.spec.blocks[unit.first : unit.stop])

    def nbytes(self, unit: Unit) -> int:
        """Bytes of a scattered unit's rows; 0 for a peer's own rows."""
        return sum(block.nbytes for block in self.spec.blocks[unit.first : unit.stop])

    @cached_property
    def total_rows(self) -> int:
        return _count_rows(self.spec.blocks)

    @cached_property
    def verified_rows(self) -> int:
        """Rows with a verified answer. For its own rows, each peer says how many."""
        verified = (unit for unit in self.units.values() if unit.verified)
        return sum(self.rows(u) if self.is_scattered else u.answer.rows for u in verified)

    @property
    def on_disk(self) -> set[str]:
        """Digests of the rows and answers that are stored in files."""
        answers = (answer for unit in self.units.values() for answer in unit.answers.values())
        return ({a.digest for a in answers if not a.body} | {self.spec.input}) - {""}

    def leases(self) -> Iterator[tuple[Unit, str, Lease]]:
        for unit in self.units.values():
            for peer, lease in unit.leases.items():
                yield unit, peer, lease

    def with_unit(self, unit: Unit, **changes: Any) -> Job:
        return replace(self, units={**self.units, unit.number: unit}, **changes)


def _count_rows(blocks: Iterable[Block]) -> int:
    return sum(block.rows for block in blocks)


# --- transitions -----------------------------------------------------------------------------


def _leased(job: Job, unit: Unit, event: events.UnitLeased) -> Job:
    return job.with_unit(replace(unit, leases={**unit.leases, event.peer: "open"}))


def _lease_ended(job: Job, unit: Unit, event: events.LeaseEnded) -> Job:
    if event.peer not in unit.leases:
        return job
    if event.reason == OVERDUE:
        return job.with_unit(replace(unit, leases={**unit.leases, event.peer: "overdue"}))
    failed = unit.failed | {event.peer} if event.reason == FAILED else unit.failed
    return job.with_unit(unit.without_lease(event.peer, failed=failed))


def _returned(job: Job, unit: Unit, event: events.UnitReturned) -> Job:
    peer, answer = event.peer, event.given
    job = job.with_unit(unit.without_lease(peer, answers={**unit.answers, peer: answer}))
    if answer.seconds <= 0 or not answer.rows:
        return job
    rate = answer.rows / answer.seconds
    known = job.rates.get(peer, rate)
    return replace(job, rates={**job.rates, peer: known + _RATE_WEIGHT * (rate - known)})


def _verified(job: Job, unit: Unit, event: events.UnitVerified) -> Job:
    # Leases stay: their peers still work on it, and get no other work before they have answered.
    return job.with_unit(replace(unit, verified=event.digest))


def _dropped(job: Job, unit: Unit, event: events.AnswerDropped) -> Job:
    changes: dict[str, Any] = {}
    if not unit.verified:
        answers = {peer: answer for peer, answer in unit.answers.items() if peer != event.peer}
        changes = {"answers": answers, "failed": unit.failed | {event.peer}}
    dropped = {**job.dropped, event.reason: job.dropped.get(event.reason, 0) + 1}
    return job.with_unit(unit.without_lease(event.peer, **changes), dropped=dropped)


_ALL = frozenset(UnitState)
_NOT_VERIFIED = _ALL - {UnitState.VERIFIED}
#: By event of a unit: the states that admit it, and its transition.
ADMITS: dict[type[Any], tuple[frozenset[UnitState], Callable[[Job, Unit, Any], Job]]] = {
    events.UnitLeased: (_NOT_VERIFIED, _leased),
    events.LeaseEnded: (_ALL, _lease_ended),
    events.UnitReturned: (_NOT_VERIFIED, _returned),
    events.UnitVerified: (frozenset({UnitState.RETURNED}), _verified),
    events.AnswerDropped: (_ALL, _dropped),
}


def apply(job: Job, event: JobEvent) -> Job:
    """The job after `event`."""
    match event:
        case events.PeerExcused(peer, reason):
            return replace(job, excused={**job.excused, peer: reason})
        case events.JobEnded(state, because, at):
            units = {n: replace(unit, leases={}) for n, unit in job.units.items()}
            return replace(job, state=state, ended_because=because, ended_at=at, units=units)
        case events.JobResumed():
            units = {n: replace(unit, failed=frozenset()) for n, unit in job.units.items()}
            cleared = replace(job, ended_because="", ended_at=0.0, excused={}, units=units)
            return replace(cleared, state=JobState.WORKING)
        case events.JobTaken():
            return replace(job, taken=True)
        case events.UnitEvent():
            return _apply_to_unit(job, event)
    return job


def _apply_to_unit(job: Job, event: events.UnitEvent) -> Job:
    unit = job.units.get(event.unit)
    if unit is None and isinstance(event, events.UnitLeased):
        unit = Unit(number=event.unit, first=event.first, stop=event.stop)
    if unit is None or (job.ended and not isinstance(event, events.AnswerDropped)):
        return job
    states, transition = ADMITS[type(event)]
    return transition(job, unit, event) if unit.state in states else job


def started(job_id: str, spec: JobSpec, at: float = 0.0) -> Job:
    """A job at its start. A job about the peers' own rows has a unit for each peer."""
    own = {n: Unit(number=n, only=peer) for n, peer in enumerate(spec.peers)}
    return Job(id=job_id, spec=spec, units={} if spec.kind == "scatter" else own, began_at=at)


def replay(job_id: str, past: list[JobEvent]) -> Job:
    """The job after these events, of which the first is JobStarted."""
    first, *rest = past
    assert isinstance(first, events.JobStarted), "a job's first event is JobStarted"
    return reduce(apply, rest, started(job_id, first.spec, first.at))
