"""The mode "buffered": peers train independently, and a fixed number of updates makes a version.
Pure.

FedBuff: Nguyen et al. 2022, arXiv 2106.06639. The events are those of rounds: round r is open while
version r is made. Each peer has an assignment of its own (`state.Assignment`) on the version that
was newest when the peer was free, and it may span several rounds. Evaluation of version r and
training for version r + 1 run at the same time. An update whose base is tau versions old has the
weight 1/√(1 + tau).
"""

from __future__ import annotations

import math
from collections.abc import Set

from coordinator.runs.state import Assignment, Run
from coordinator.storage.run_events import UpdateAccepted, WorkGiven


def staleness(run: Run, work: Assignment) -> int:
    """The number of versions made since the base of this assignment."""
    return run.num_versions - (work.round - 1)


def is_stale(run: Run, work: Assignment) -> bool:
    """True if the update of this assignment would be refused."""
    return staleness(run, work) > run.spec.max_staleness


def discount(staleness: int) -> float:
    """The weight of an update (section 5 of the paper)."""
    return 1 / math.sqrt(1 + staleness)


def is_full(run: Run) -> bool:
    """True when a version can be made. Updates recorded together stay together."""
    return len(run.buffer) >= run.spec.buffer


def is_over(run: Run) -> bool:
    """True when the run has its last version. Work in progress is then too late."""
    return run.num_versions >= run.spec.rounds


def in_order(run: Run) -> list[UpdateAccepted]:
    """The buffer in an order that does not depend on the order of arrival."""
    return sorted(run.buffer, key=lambda one: (one.peer, one.round, one.update.turn))


def work_for(
    run: Run, eligible: Set[str], deadline_passed: bool, decided: Set[str] = frozenset()
) -> tuple[WorkGiven, ...]:
    """Assignments for free peers, up to the run's concurrency, longest free first.

    A peer that comes back keeps its assignment, unless it is too old. A peer whose last update was
    refused gets nothing before the next version or the deadline, unless its owner has `decided`.
    """
    cooling_down = frozenset() if deadline_passed else run.cooling_down - decided
    at_work = sum(not work.lost for work in run.assignments.values())
    room = (run.spec.concurrency or len(eligible)) - at_work
    free = [
        peer
        for peer in eligible - cooling_down
        if peer not in run.assignments or run.assignments[peer].lost
    ]
    free.sort(
        key=lambda peer: (
            run.last_assignments[peer].round if peer in run.last_assignments else 0,
            peer,
        )
    )
    return tuple(_next(run, peer) for peer in free[: max(0, room)])


def _next(run: Run, peer: str) -> WorkGiven:
    current = run.assignments.get(peer)
    if current is not None and not is_stale(run, current):
        return WorkGiven(peer, current.round, current.base, current.turn)
    number, last = run.num_versions + 1, run.last_assignments.get(peer)
    turn = last.turn + 1 if last is not None and last.base == run.head else 0
    return WorkGiven(peer, number, run.head, turn)
