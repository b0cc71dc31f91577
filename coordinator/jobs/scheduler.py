"""What to do next in a job: `decide(job, view)` gives steps, none when there is only to wait. Pure.

Rule 1. A peer has one unit of a job in hand, and one more behind it while enough is left: so that
        it need not wait for us. One that is overdue with a unit gets no other.
Rule 2. Who gets a unit: one that was given back before one that is cut anew; then, when all is out,
        the last 5 % of the rows once more, for peers that would be idle (backup tasks, Dean and
        Ghemawat 2004, section 3.6).
Rule 3. A unit is cut for `UNIT_S` of the peer's measured speed, and of what is left each peer gets
        half of its share by speed at most (weighted factoring, Hummel et al. 1996), and never more
        than half of the last part: so that at the end nobody waits long for anybody. Less than
        `LEAST_S` of work is not worth the way.
Rule 4. A unit that failed on `MOST_FAILURES` peers fails the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from coordinator.jobs.state import OVERDUE, Job, Unit
from coordinator.storage.job_events import JobState

UNIT_S, MIN_UNIT_S = 2.0, 0.25
#: A lease lasts so many times what the peer should need, and no less than `LEASE_S`; `FIRST_S` as
#: long as nobody knows its speed: it may have to fetch the model first, and start its trainer.
LEASE_FACTOR, MIN_LEASE_S, UNKNOWN_SPEED_LEASE_S = 4.0, 5.0, 60.0
LAST_PART = 0.05
MAX_FAILURES = 3
#: The first units of a peer whose speed nobody knows: so many to the whole, for each peer.
_PROBES = 16


class Availability(NamedTuple):
    """What is so now, and no fact: who can be given work, and which leases (unit, peer) are up.

    `due`: the job's own deadline has passed. `deserted`: nobody has been there for a while.
    """

    eligible: frozenset[str]
    gone: frozenset[tuple[int, str]] = frozenset()
    overdue: frozenset[tuple[int, str]] = frozenset()
    due: bool = False
    deserted: bool = False


class Lease(NamedTuple):
    unit: int
    peer: str
    first: int = 0
    stop: int = 0


class EndLease(NamedTuple):
    unit: int
    peer: str
    reason: str


class End(NamedTuple):
    state: JobState
    because: str


Step = Lease | EndLease | End


def decide(job: Job, view: Availability) -> list[Step]:
    """The next steps. After a Lease of each free peer there is nothing to do until news come."""
    if (end := _end(job, view)) is not None:
        return [end]
    ended: list[Step] = [EndLease(unit, peer, "went away") for unit, peer in sorted(view.gone)]
    # What a peer has behind an overdue unit waits for nothing.
    late = {peer for _, peer in view.overdue - view.gone}
    ended += [
        EndLease(unit.number, peer, OVERDUE)
        for unit, peer, lease in job.leases()
        if lease == "open" and peer in late and (unit.number, peer) not in view.gone
    ]
    return ended or list(_leases(job, view))


def lease_duration_s(job: Job, unit: Unit, peer: str) -> float:
    """How long a peer may take for a unit, in s."""
    rate = job.rates.get(peer)
    return max(MIN_LEASE_S, LEASE_FACTOR * job.rows(unit) / rate) if rate else UNKNOWN_SPEED_LEASE_S


# --- its end ---------------------------------------------------------------------------------


def _end(job: Job, view: Availability) -> End | None:
    open_units = [unit for unit in job.units.values() if not unit.verified]
    for unit in open_units:
        if len(unit.failed) >= MAX_FAILURES:
            reasons = sorted({job.excused.get(peer, "bad answers") for peer in unit.failed})
            return End(
                JobState.FAILED,
                f"unit {unit.number} failed on {len(unit.failed)} peers: {'; '.join(reasons)}",
            )
    if job.is_scattered:
        if job.num_cut_blocks == len(job.spec.blocks) and not open_units:
            return End(JobState.FINISHED, f"all {job.total_rows:,} rows are answered")
        return _stuck(job, view)
    waiting = [unit for unit in open_units if unit.only not in job.excused]
    if waiting and not view.due:
        return None
    answered = len(job.units) - len(open_units)
    words = f"{answered} of {len(job.units)} peers answered"
    return End(JobState.FINISHED if answered else JobState.FAILED, words)


def _stuck(job: Job, view: Availability) -> End | None:
    """A scattered job ends if nobody who is there can bring it on, and nothing is under way."""
    able = view.eligible - job.excused.keys()
    anybody = view.eligible or (view.deserted and job.excused)
    if not anybody or any(job.leases()):
        return None
    if not able:
        reasons = sorted(set(job.excused.values()))
        return End(JobState.FAILED, f"no peer can do it: {'; '.join(reasons)}"[:400])
    for unit in job.units.values():
        tried = unit.failed | unit.given.keys()
        enough = len(tried) >= job.spec.quorum
        if not unit.verified and tried and enough and able <= tried:
            words = f"no {job.spec.quorum} peers agree on unit {unit.number}"
            return End(JobState.FAILED, words if unit.given else f"{words}: bad answers only")
    return None


# --- who does what ---------------------------------------------------------------------------


def _leases(job: Job, view: Availability) -> Iterator[Lease]:
    in_hand = Counter(peer for _, peer, _ in job.leases())
    able = view.eligible - job.excused.keys()
    # The fastest first: what was given back is waited for already.
    order = sorted(able, key=lambda peer: (-job.rates.get(peer, 0.0), peer))
    free = [peer for peer in order if not in_hand[peer]]
    if not job.is_scattered:
        waiting = {unit.only: unit for unit in job.units.values() if not unit.verified}
        yield from (Lease(waiting[peer].number, peer) for peer in free if peer in waiting)
        return
    given: dict[int, set[str]] = {}
    cut, number = job.num_cut_blocks, len(job.units)
    left = job.total_rows - job.num_cut_rows
    for peer in [*free, *(peer for peer in order if _may_have_more(job, peer, in_hand))]:
        behind = bool(in_hand[peer])
        unit = None if behind else _missing_quorum(job, peer, given)
        if unit is None and cut < len(job.spec.blocks):
            if behind and left <= LAST_PART * job.total_rows:
                continue
            stop = _unit_stop(job, peer, cut, left, able)
            yield Lease(number, peer, cut, stop)
            left -= sum(block.rows for block in job.spec.blocks[cut:stop])
            cut, number = stop, number + 1
            continue
        if unit is None and not behind:
            unit = _backup_unit(job, peer, given)
        if unit is not None:
            given.setdefault(unit.number, set()).add(peer)
            yield Lease(unit.number, peer, unit.first, unit.stop)


def _may_have_more(job: Job, peer: str, in_hand: Counter[str]) -> bool:
    """True for a peer of known speed whose one unit is awaited."""
    return (
        in_hand[peer] == 1
        and peer in job.rates
        and any(p == peer and lease == "open" and not u.verified for u, p, lease in job.leases())
    )


def _open_units(job: Job, peer: str) -> Iterator[Unit]:
    """Units that this peer could still do."""
    for unit in job.units.values():
        if not unit.verified and peer not in unit.failed | unit.leases.keys() | unit.given.keys():
            yield unit


def _missing_quorum(job: Job, peer: str, given: dict[int, set[str]]) -> Unit | None:
    """A unit that too few peers are at for its quorum."""
    for unit in _open_units(job, peer):
        at_it = sum(lease == "open" for lease in unit.leases.values())
        if at_it + len(given.get(unit.number, ())) + unit.agreed < job.spec.quorum:
            return unit
    return None


def _backup_unit(job: Job, peer: str, given: dict[int, set[str]]) -> Unit | None:
    """One of the last units, that only one peer more than needed is at."""
    left = job.total_rows - job.verified_rows
    largest = max(block.rows for block in job.spec.blocks)
    if left > max(LAST_PART * job.total_rows, largest):
        return None
    for unit in _open_units(job, peer):
        more = len(unit.leases) + len(given.get(unit.number, ())) + unit.agreed
        if more <= job.spec.quorum:
            return unit
    return None


def _unit_stop(job: Job, peer: str, first: int, left: int, able: frozenset[str]) -> int:
    """Where a new unit for this peer ends, with `left` rows to be cut: a block at least."""
    known = [job.rates[one] for one in able if one in job.rates]
    rate = job.rates.get(peer)
    wanted = job.total_rows / (_PROBES * len(able))
    if rate:
        speed = sum(known) + fmean(known) * (len(able) - len(known))
        wanted = min(rate * UNIT_S, left * rate / speed / 2)
    wanted = min(wanted, LAST_PART / 2 * job.total_rows)
    if rate:
        wanted = max(wanted, rate * MIN_UNIT_S)
    stop, rows = first + 1, job.spec.blocks[first].rows
    while stop < len(job.spec.blocks) and rows + job.spec.blocks[stop].rows <= wanted:
        rows += job.spec.blocks[stop].rows
        stop += 1
    return stop
