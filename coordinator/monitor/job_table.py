"""Jobs as the monitor shows them: the table's cells, and what is known of one in words. Pure."""

from __future__ import annotations

from coordinator.fleet.reducer import Fleet, Job, called
from coordinator.monitor.peer_table import Cell, Column, Tone
from coordinator.remote.formatting import (
    NOTHING,
    age,
    count,
    duration,
    format_bytes,
    progress,
    rate,
    truncate,
)

#: How a state is shown; one that only a newer coordinator knows is shown as it came.
STATES: dict[str, tuple[str, Tone]] = {
    "working": ("●", "good"),
    "finished": ("✓", "plain"),
    "stopped": ("■", "warn"),
    "failed": ("!", "bad"),
}
KINDS = {
    "private": "each peer measures the models on its own rows",
    "scatter": "rows that were given away are spread over the peers",
    "analyze": "a figure from the peers' own tables",
}


def is_working(job: Job) -> bool:
    """True for a job that has not ended."""
    return job.changed.state == "working"


def num_working(fleet: Fleet) -> int:
    """How many jobs are under way."""
    return sum(map(is_working, fleet.jobs.values()))


def sort_jobs(fleet: Fleet) -> list[Job]:
    """What is under way first, then what ended last."""
    newest = sorted(fleet.jobs.values(), key=lambda job: -(job.ended_at or job.changed_at))
    return sorted(newest, key=lambda job: not is_working(job))


def duration_s(job: Job, now: float) -> float | None:
    """How long it has been worked on, or was; None if not known."""
    end = now if is_working(job) else job.ended_at
    return max(end - job.began_at, 0.0) if job.began_at and end else None


def rows_per_s(job: Job, now: float) -> float:
    """Rows a second: of those at it, or what it came to."""
    if is_working(job):
        return job.changed.rows_per_s
    took = duration_s(job, now)
    return job.changed.rows / took if took else 0.0


def num_remaining(job: Job) -> int:
    """What nobody has answered for yet, nor has in hand."""
    changed = job.changed
    return max(changed.total - changed.done - changed.leased, 0)


def count_items(job: Job, number: int) -> str:
    """`3 rows`, `1 peer`: what the job is counted in."""
    what = "row" if job.changed.kind == "scatter" else "peer"
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


# --- the table -------------------------------------------------------------------------------


def state_cell(job: Job, now: float, width: int = 80) -> Cell:
    """Glyph and word."""
    state = job.changed.state
    glyph, tone = STATES.get(state, ("·", "quiet"))
    return Cell(truncate(f"{glyph} {state}", width), tone)


def _done(job: Job, now: float, width: int) -> Cell:
    done, total = min(job.changed.done, job.changed.total), job.changed.total
    share = f" {100 * done // total:>3} %" if total else "   – %"
    return Cell(progress(done, total, width - len(share)) + share, "busy")


def _left(job: Job, now: float, width: int) -> Cell:
    return Cell(count_items(job, num_remaining(job)) if is_working(job) else NOTHING)


def _duration(job: Job, now: float, width: int) -> Cell:
    took = duration_s(job, now)
    return Cell(NOTHING if took is None else duration(took), "quiet")


def _speed(job: Job, now: float, width: int) -> Cell:
    speed = rows_per_s(job, now)
    return Cell(rate(speed) if speed else NOTHING)


def _peers(job: Job, now: float, width: int) -> Cell:
    return Cell(count(job.changed.peers) if is_working(job) else NOTHING)


def _leased(job: Job, now: float, width: int) -> Cell:
    return Cell(count(job.changed.leased) if is_working(job) else NOTHING)


def _units(job: Job, now: float, width: int) -> Cell:
    return Cell(count(job.changed.units))


def _up(job: Job, now: float, width: int) -> Cell:
    return Cell(format_bytes(job.changed.bytes_up))


def _down(job: Job, now: float, width: int) -> Cell:
    return Cell(format_bytes(job.changed.bytes_down) if job.changed.bytes_down else NOTHING)


def _outcome(job: Job, now: float, width: int) -> Cell:
    return Cell(truncate(job.changed.ended_because or job.changed.task, width), "quiet")


#: In drop order, as the fleet's.
COLUMNS: tuple[Column[Job], ...] = (
    Column("state", "State", 10, 12, 0, state_cell),
    Column("job", "Job", 14, 18, 0, lambda job, now, width: Cell(truncate(job.changed.job, width))),
    Column("done", "Done", 11, 24, 0, _done),
    Column("left", "Left", 10, 12, 0, _left, right=True),
    Column("took", "Time", 6, 6, 80, _duration, right=True),
    Column("speed", "Rows/s", 7, 7, 80, _speed, right=True),
    Column("peers", "Peers", 5, 5, 120, _peers, right=True),
    Column("outcome", "Outcome", 20, 60, 120, _outcome),
    Column("up", "Up", 7, 7, 120, _up, right=True),
    Column("down", "Down", 7, 7, 120, _down, right=True),
    Column("hand", "In hand", 7, 7, 160, _leased, right=True),
    Column("units", "Units", 6, 6, 160, _units, right=True),
)


# --- one job ---------------------------------------------------------------------------------


def describe_job(job: Job, fleet: Fleet, now: float) -> list[tuple[str, Cell]]:
    """All that is known of a job: (what, words), the most important first."""
    changed = job.changed
    state = state_cell(job, now)
    ago = f" {age(now - job.ended_at)} ago" if job.ended_at else ""
    because = f": {changed.ended_because}" if changed.ended_because else ""
    told = [("state", Cell(f"{state.text}{ago}{because}", state.tone))]
    asks = KINDS.get(changed.kind, changed.kind)
    told.append(("what", Cell(f"{asks} · {changed.task}" if changed.task else asks)))
    done = f"{changed.done:,} of {count_items(job, changed.total)}"
    if is_working(job):
        at_it = f"{count(changed.peers)} peer{'' if changed.peers == 1 else 's'}"
        done += f" · {count(changed.leased)} in hand at {at_it} · {count(num_remaining(job))} left"
    told.append(("done", Cell(done)))
    units = "unit" if changed.units == 1 else "units"
    rows = f"{changed.rows:,} rows in {count(changed.units)} {units}"
    speed, took = rows_per_s(job, now), duration_s(job, now)
    rows += f" · {rate(speed)}" if speed else ""
    rows += f" · {duration(took)}" if took is not None else ""
    told.append(("answered", Cell(rows)))
    traffic = f"{format_bytes(changed.bytes_up)} of answers up"
    if changed.bytes_down:
        traffic += f" · {format_bytes(changed.bytes_down)} of rows down"
    told.append(("bytes", Cell(traffic)))
    if changed.dropped:
        answers = "answer" if changed.dropped == 1 else "answers"
        told.append(("dropped", Cell(f"{count(changed.dropped)} {answers} did not count", "warn")))
    for peer, reason in changed.excused.items():
        name = called(fleet.peers[peer]) if peer in fleet.peers else peer
        told.append(("excused", Cell(f"{name}: {reason}", "warn")))
    if (more := changed.num_excused - len(changed.excused)) > 0:
        told.append(("excused", Cell(f"and {count(more)} more", "warn")))
    return told
