"""A job as a pure state machine: facts in, its state out. No I/O, no clock.

Rule 1. The state of a job is the fold of its facts (`apply`); the ledger holds nothing else of it.
Rule 2. `scheduler.decide(job, view)` says what to do next.
Rule 3. A fact that a unit's state does not admit (`ADMITS`) changes nothing.

    queued ──UnitLeased──> leased ──UnitReturned──> returned ──UnitVerified──> verified
      ^                      │                         │
      └──────LeaseEnded──────┴──────AnswerDropped──────┘

A unit may have several leases: at the end, for a quorum, and after one that was overdue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from coordinator.storage.job_events import (
    AnswerDropped,
    Given,
    JobEnded,
    JobEvent,
    JobResumed,
    JobSpec,
    JobStarted,
    JobState,
    JobTaken,
    LeaseEnded,
    PeerExcused,
    UnitLeased,
    UnitReturned,
    UnitVerified,
)

#: `overdue`: it is asked for elsewhere too, and would still count.
Lease = Literal["open", "overdue"]
OVERDUE, FAILED = "overdue", "failed"
#: How much a new measurement of a peer's speed counts.
_RATE_WEIGHT = 0.5


class UnitState(StrEnum):
    QUEUED = "queued"
    LEASED = "leased"
    RETURNED = "returned"
    VERIFIED = "verified"


class Unit(Struct, frozen=True, kw_only=True, dict=True):
    """Blocks `first` up to `stop` of a scattered job, or all of one peer's rows (`only`)."""

    number: int
    first: int = 0
    stop: int = 0
    only: str = ""
    leases: dict[str, Lease] = {}
    given: dict[str, Given] = {}
    failed: frozenset[str] = frozenset()
    verified: str = ""

    @property
    def state(self) -> UnitState:
        if self.verified:
            return UnitState.VERIFIED
        if self.given:
            return UnitState.RETURNED
        if "open" in self.leases.values():
            return UnitState.LEASED
        return UnitState.QUEUED

    @property
    def answer(self) -> Given:
        """The verified answer."""
        return next(given for given in self.given.values() if given.digest == self.verified)

    @property
    def agreed(self) -> int:
        """How many peers gave the most common answer."""
        digests = [given.digest for given in self.given.values()]
        return max(map(digests.count, digests), default=0)


class Job(Struct, frozen=True, kw_only=True, dict=True):
    """A job now. `rates` are rows a second by peer; `dropped` counts answers by reason.

    `taken`: the requester has the answers. `began_at` and `ended_at` are Unix s, 0 for not known.
    """

    id: str
    spec: JobSpec
    state: JobState = JobState.WORKING
    units: dict[int, Unit] = {}
    rates: dict[str, float] = {}
    excused: dict[str, str] = {}
    dropped: dict[str, int] = {}
    ended_because: str = ""
    taken: bool = False
    began_at: float = 0.0
    ended_at: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state is not JobState.WORKING

    @property
    def is_scattered(self) -> bool:
        """True if any peer may do any unit; else each does its own."""
        return self.spec.kind == "scatter"

    @cached_property
    def num_cut_blocks(self) -> int:
        """Blocks that belong to a unit already."""
        return max((unit.stop for unit in self.units.values()), default=0)

    @cached_property
    def num_cut_rows(self) -> int:
        """Rows that belong to a unit already."""
        return sum(block.rows for block in self.spec.blocks[: self.num_cut_blocks])

    def rows(self, unit: Unit) -> int:
        """Rows of a scattered unit."""
        return sum(block.rows for block in self.spec.blocks[unit.first : unit.stop])

    def nbytes(self, unit: Unit) -> int:
        """Bytes of a scattered unit's rows; 0 of one's own rows, which go nowhere."""
        return sum(block.nbytes for block in self.spec.blocks[unit.first : unit.stop])

    @cached_property
    def total_rows(self) -> int:
        return sum(block.rows for block in self.spec.blocks)

    @cached_property
    def verified_rows(self) -> int:
        """Rows whose answer is there; of one's own rows, as the peers told."""
        return sum(
            self.rows(unit) if self.is_scattered else unit.answer.rows
            for unit in self.units.values()
            if unit.verified
        )

    @property
    def on_disk(self) -> set[str]:
        """Digests of the rows and answers that are kept in files."""
        given = (given for unit in self.units.values() for given in unit.given.values())
        return {one.digest for one in given if not one.body} | {self.spec.input} - {""}

    def leases(self) -> Iterator[tuple[Unit, str, Lease]]:
        for unit in self.units.values():
            for peer, lease in unit.leases.items():
                yield unit, peer, lease


# --- transitions -----------------------------------------------------------------------------


def _leased(job: Job, unit: Unit, fact: UnitLeased) -> Job:
    return _with(job, replace(unit, leases={**unit.leases, fact.peer: "open"}))


def _lease_ended(job: Job, unit: Unit, fact: LeaseEnded) -> Job:
    if fact.peer not in unit.leases:
        return job
    leases = {peer: lease for peer, lease in unit.leases.items() if peer != fact.peer}
    if fact.reason == OVERDUE:
        leases[fact.peer] = "overdue"
    failed = unit.failed | {fact.peer} if fact.reason == FAILED else unit.failed
    return _with(job, replace(unit, leases=leases, failed=failed))


def _returned(job: Job, unit: Unit, fact: UnitReturned) -> Job:
    given = fact.given
    leases = {peer: lease for peer, lease in unit.leases.items() if peer != fact.peer}
    job = _with(job, replace(unit, leases=leases, given={**unit.given, fact.peer: given}))
    if given.seconds <= 0 or not given.rows:
        return job
    rate = given.rows / given.seconds
    known = job.rates.get(fact.peer, rate)
    return replace(job, rates={**job.rates, fact.peer: known + _RATE_WEIGHT * (rate - known)})


def _verified(job: Job, unit: Unit, fact: UnitVerified) -> Job:
    # Leases stay: the peer is at it, and gets no other work before it has answered.
    return _with(job, replace(unit, verified=fact.digest))


def _dropped(job: Job, unit: Unit, fact: AnswerDropped) -> Job:
    leases = {peer: lease for peer, lease in unit.leases.items() if peer != fact.peer}
    given = dict(unit.given)
    failed = unit.failed
    if not unit.verified:
        given.pop(fact.peer, None)
        failed |= {fact.peer}
    counted = {**job.dropped, fact.reason: job.dropped.get(fact.reason, 0) + 1}
    return replace(
        _with(job, replace(unit, leases=leases, given=given, failed=failed)), dropped=counted
    )


def _with(job: Job, unit: Unit) -> Job:
    return replace(job, units={**job.units, unit.number: unit})


_ALL = frozenset(UnitState)
_NOT_VERIFIED = _ALL - {UnitState.VERIFIED}
#: By fact of a unit: the states that admit it, and what it changes.
ADMITS: dict[type[Any], tuple[frozenset[UnitState], Callable[[Job, Unit, Any], Job]]] = {
    UnitLeased: (_NOT_VERIFIED, _leased),
    LeaseEnded: (_ALL, _lease_ended),
    UnitReturned: (_NOT_VERIFIED, _returned),
    UnitVerified: (frozenset({UnitState.RETURNED}), _verified),
    AnswerDropped: (_ALL, _dropped),
}


def apply(job: Job, fact: JobEvent) -> Job:
    """The job after `fact`."""
    match fact:
        case PeerExcused(peer, reason):
            return replace(job, excused={**job.excused, peer: reason})
        case JobEnded(state, because, at):
            units = {n: replace(unit, leases={}) for n, unit in job.units.items()}
            return replace(job, state=state, ended_because=because, ended_at=at, units=units)
        case JobResumed():
            units = {n: replace(unit, failed=frozenset()) for n, unit in job.units.items()}
            again = replace(job, ended_because="", ended_at=0.0, excused={}, units=units)
            return replace(again, state=JobState.WORKING)
        case JobTaken():
            return replace(job, taken=True)
        case JobStarted():
            return job
        case _:
            unit = job.units.get(fact.unit)
            if unit is None and isinstance(fact, UnitLeased):
                unit = Unit(number=fact.unit, first=fact.first, stop=fact.stop)
            if unit is None or (job.ended and not isinstance(fact, AnswerDropped)):
                return job
            states, transition = ADMITS[type(fact)]
            return transition(job, unit, fact) if unit.state in states else job


def started(job_id: str, spec: JobSpec, at: float = 0.0) -> Job:
    """A job at its beginning. One of the peers' own rows has a unit for each of them."""
    own = {n: Unit(number=n, only=peer) for n, peer in enumerate(spec.peers)}
    return Job(id=job_id, spec=spec, units={} if spec.kind == "scatter" else own, began_at=at)


def replay(job_id: str, facts: list[JobEvent]) -> Job:
    """The job that these facts, the first of them JobStarted, add up to."""
    first = facts[0]
    assert isinstance(first, JobStarted), "a job's first fact is JobStarted"
    job = started(job_id, first.spec, first.at)
    for fact in facts[1:]:
        job = apply(job, fact)
    return job
