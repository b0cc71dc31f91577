"""What happens next in a job: `decide(job, available)` gives events, none if it must wait. Pure.

Rule 1. A peer has one unit of a job, and a second one queued behind it while many rows are left, so
        that it never waits for the coordinator. A peer with an overdue unit gets no other unit.
Rule 2. Units that were given back come first, then newly cut ones. When all rows are cut, idle
        peers repeat the last 5 % of the rows (backup tasks, Dean and Ghemawat 2004, section 3.6).
Rule 3. A unit holds `UNIT_S` of work at the peer's measured speed, but at most half of the peer's
        share of the remaining rows (weighted factoring, Hummel et al. 1996), and at most half of
        the last 5 %, so that the wait at the end is short. It holds `MIN_UNIT_S` of work at least:
        less is not worth the request.
Rule 4. A unit that failed on `MAX_FAILURES` peers fails the job.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from coordinator.jobs.state import OVERDUE, Job, Unit
from coordinator.storage.job_events import JobEnded, JobEvent, JobState, LeaseEnded, UnitLeased

UNIT_S, MIN_UNIT_S = 2.0, 0.25
#: A lease lasts `LEASE_FACTOR` times the expected time, and `MIN_LEASE_S` at least. At unknown
#: speed it lasts longer: the peer may first fetch the model and start its trainer.
LEASE_FACTOR, MIN_LEASE_S, UNKNOWN_SPEED_LEASE_S = 4.0, 5.0, 60.0
LAST_PART = 0.05
MAX_FAILURES = 3
#: The first unit of a peer of unknown speed is this fraction of an equal share.
_PROBES = 16


class Availability(NamedTuple):
    """Observations that are not in the ledger: who can work now, and which leases (unit, peer) are
    over.

    `due`: the job's own deadline has passed. `deserted`: for some time no peer was available.
    `awaits_consent`: an owner has not decided about the task yet; such a peer is not eligible.
    `at`: the time, Unix s, which an end records.
    """

    eligible: frozenset[str]
    gone: frozenset[tuple[int, str]] = frozenset()
    overdue: frozenset[tuple[int, str]] = frozenset()
    due: bool = False
    deserted: bool = False
    awaits_consent: bool = False
    at: float = 0.0


def decide(job: Job, available: Availability) -> list[JobEvent]:
    """The next events. After leases for idle peers, call it again once something has changed."""
    if (end := _end(job, available)) is not None:
        return [JobEnded(*end, available.at)]
    gone = available.gone
    ended: list[JobEvent] = [LeaseEnded(unit, peer, "went away") for unit, peer in sorted(gone)]
    # The unit that a peer has queued behind an overdue one is overdue as well.
    late = {peer for _, peer in available.overdue - gone}
    ended += [
        LeaseEnded(unit.number, peer, OVERDUE)
        for unit, peer, lease in job.leases()
        if lease == "open" and peer in late and (unit.number, peer) not in gone
    ]
    return ended or list(_leases(job, available))


def lease_duration_s(job: Job, unit: Unit, peer: str) -> float:
    """How long a peer may take for a unit, in s."""
    rate = job.rates.get(peer)
    if not rate:
        return UNKNOWN_SPEED_LEASE_S
    return max(MIN_LEASE_S, LEASE_FACTOR * job.rows(unit) / rate)


# --- when a job ends -------------------------------------------------------------------------


def _end(job: Job, available: Availability) -> tuple[JobState, str] | None:
    open_units = [unit for unit in job.units.values() if not unit.verified]
    for unit in open_units:
        if len(unit.failed) >= MAX_FAILURES:
            reasons = sorted({job.excused.get(peer, "bad answers") for peer in unit.failed})
            failed = f"unit {unit.number} failed on {len(unit.failed)} peers"
            return JobState.FAILED, f"{failed}: {'; '.join(reasons)}"
    if job.is_scattered:
        if job.num_cut_blocks == len(job.spec.blocks) and not open_units:
            return JobState.FINISHED, f"all {job.total_rows:,} rows are answered"
        return _stuck(job, available)
    if not available.due and any(unit.only not in job.excused for unit in open_units):
        return None
    answered = len(job.units) - len(open_units)
    state = JobState.FINISHED if answered else JobState.FAILED
    return state, f"{answered} of {len(job.units)} peers answered"


def _stuck(job: Job, available: Availability) -> tuple[JobState, str] | None:
    """The end of a scattered job that no available peer can advance and that has no lease."""
    able = available.eligible - job.excused.keys()
    anybody = available.eligible or (available.deserted and job.excused)
    if not anybody or any(job.leases()) or available.awaits_consent:
        return None
    if not able:
        reasons = sorted(set(job.excused.values()))
        return JobState.FAILED, f"no peer can do it: {'; '.join(reasons)}"[:400]
    for unit in job.units.values():
        tried = unit.failed | unit.answers.keys()
        enough = len(tried) >= job.spec.quorum
        if not unit.verified and tried and enough and able <= tried:
            reason = f"no {job.spec.quorum} peers agree on unit {unit.number}"
            return JobState.FAILED, reason + ("" if unit.answers else ": bad answers only")
    return None


# --- who does what ---------------------------------------------------------------------------


def _leases(job: Job, available: Availability) -> Iterator[UnitLeased]:
    num_leases = Counter(peer for _, peer, _ in job.leases())
    able = available.eligible - job.excused.keys()
    # The fastest first, because others may already wait for a unit that was given back.
    order = sorted(able, key=lambda peer: (-job.rates.get(peer, 0.0), peer))
    idle = [peer for peer in order if not num_leases[peer]]
    if not job.is_scattered:
        waiting = {unit.only: unit for unit in job.units.values() if not unit.verified}
        yield from (UnitLeased(waiting[peer].number, peer) for peer in idle if peer in waiting)
        return
    #: The peers that get each existing unit in this call.
    added: dict[int, set[str]] = defaultdict(set)
    cut, number = job.num_cut_blocks, len(job.units)
    left = job.total_rows - job.num_cut_rows
    for peer in [*idle, *(peer for peer in order if _may_queue(job, peer, num_leases))]:
        busy = bool(num_leases[peer])
        unit = None if busy else _missing_quorum(job, peer, added)
        if unit is None and cut < len(job.spec.blocks):
            if busy and left <= LAST_PART * job.total_rows:
                continue
            stop = _unit_stop(job, peer, cut, left, able)
            yield UnitLeased(number, peer, cut, stop)
            left -= sum(block.rows for block in job.spec.blocks[cut:stop])
            cut, number = stop, number + 1
            continue
        if unit is None and not busy:
            unit = _backup_unit(job, peer, added)
        if unit is not None:
            added[unit.number].add(peer)
            yield UnitLeased(unit.number, peer, unit.first, unit.stop)


def _may_queue(job: Job, peer: str, num_leases: Counter[str]) -> bool:
    """True for a peer of known speed that works on its only unit."""
    return (
        num_leases[peer] == 1
        and peer in job.rates
        and any(p == peer and lease == "open" and not u.verified for u, p, lease in job.leases())
    )


def _open_units(job: Job, peer: str) -> Iterator[Unit]:
    """Units that this peer can still do."""
    for unit in job.units.values():
        tried = unit.failed | unit.leases.keys() | unit.answers.keys()
        if not unit.verified and peer not in tried:
            yield unit


def _missing_quorum(job: Job, peer: str, added: dict[int, set[str]]) -> Unit | None:
    """A unit on which fewer peers work than its quorum needs."""
    for unit in _open_units(job, peer):
        working = sum(lease == "open" for lease in unit.leases.values())
        if working + len(added[unit.number]) + unit.agreed < job.spec.quorum:
            return unit
    return None


def _backup_unit(job: Job, peer: str, added: dict[int, set[str]]) -> Unit | None:
    """One of the last units, on which no more than one extra peer works."""
    left = job.total_rows - job.verified_rows
    largest = max(block.rows for block in job.spec.blocks)
    if left > max(LAST_PART * job.total_rows, largest):
        return None
    for unit in _open_units(job, peer):
        if len(unit.leases) + len(added[unit.number]) + unit.agreed <= job.spec.quorum:
            return unit
    return None


def _unit_stop(job: Job, peer: str, first: int, left: int, able: frozenset[str]) -> int:
    """The block at which a new unit for this peer stops. `left` rows are not cut yet."""
    known = [job.rates[one] for one in able if one in job.rates]
    most = LAST_PART / 2 * job.total_rows
    if rate := job.rates.get(peer):
        speed = sum(known) + fmean(known) * (len(able) - len(known))
        wanted = max(min(rate * UNIT_S, left * rate / speed / 2, most), rate * MIN_UNIT_S)
    else:
        wanted = min(job.total_rows / (_PROBES * len(able)), most)
    stop, rows = first + 1, job.spec.blocks[first].rows
    while stop < len(job.spec.blocks) and rows + job.spec.blocks[stop].rows <= wanted:
        rows += job.spec.blocks[stop].rows
        stop += 1
    return stop
