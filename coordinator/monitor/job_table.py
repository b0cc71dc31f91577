"""Jobs as the monitor shows them: the cells of the table, and the details of one job. Pure."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.fleet.state import Fleet, Job
from coordinator.monitor.peer_table import Cell, Column, Tone, peer_name
from coordinator.remote import formatting as fmt

#: Glyph and tone by state; an unknown state of a newer coordinator is shown as it is.
STATES: dict[str, tuple[str, Tone]] = {
    "working": ("●", "good"),
    "finished": ("✓", "plain"),
    "stopped": ("■", "warn"),
    "failed": ("!", "bad"),
}
KINDS = {
    "private": "each peer evaluates the models on its own rows",
    "scatter": "your rows are distributed over the peers",
    "analyze": "a statistic of the peers' own tables",
}


def is_working(job: Job) -> bool:
    """True for a job that has not ended."""
    return job.changed.state == "working"


def num_working(fleet: Fleet) -> int:
    """The number of jobs that have not ended."""
    return sum(map(is_working, fleet.jobs.values()))


def sort_jobs(fleet: Fleet) -> list[Job]:
    """The working jobs first, then the ended ones; the newest first in each group."""
    return sorted(
        fleet.jobs.values(),
        key=lambda job: (not is_working(job), -(job.ended_at or job.changed_at)),
    )


def duration_s(job: Job, now: float) -> float | None:
    """Seconds from its start to its end or to now; None if not known."""
    end = now if is_working(job) else job.ended_at
    return max(end - job.began_at, 0.0) if job.began_at and end else None


def rows_per_s(job: Job, now: float) -> float:
    """The current rate of a working job, or the mean rate of an ended one."""
    if is_working(job):
        return job.changed.rows_per_s
    took = duration_s(job, now)
    return job.changed.rows / took if took else 0.0


def num_remaining(job: Job) -> int:
    """Items that are neither answered nor leased to a peer."""
    changed = job.changed
    return max(changed.total - changed.done - changed.leased, 0)


def count_items(job: Job, number: int) -> str:
    """`3 rows`, `1 peer`: a number in the unit of the job."""
    return fmt.plural(number, "row" if job.changed.kind == "scatter" else "peer")


# --- the table -------------------------------------------------------------------------------


def is_unanswered(job: Job) -> bool:
    """True for a job that has finished without any row or statistic from a peer."""
    changed = job.changed
    answered = changed.units if changed.kind == "analyze" else changed.rows
    return changed.state == "finished" and not answered


def state_cell(job: Job, now: float, width: int = 80) -> Cell:
    """Glyph and state."""
    state = job.changed.state
    glyph, tone = STATES.get(state, ("·", "quiet"))
    if is_unanswered(job):
        glyph, state, tone = "✕", "no answer", "bad"
    return Cell(fmt.truncate(f"{glyph} {state}", width), tone)


def _done(job: Job, now: float, width: int) -> Cell:
    done, total = min(job.changed.done, job.changed.total), job.changed.total
    if is_unanswered(job):
        done = 0
    share = f" {100 * done // total:>3} %" if total else "   – %"
    return Cell(fmt.progress(done, total, width - len(share)) + share, "busy")


def _duration(job: Job, now: float, width: int) -> Cell:
    took = duration_s(job, now)
    return Cell(fmt.NOTHING if took is None else fmt.duration(took), "quiet")


def _speed(job: Job, now: float, width: int) -> Cell:
    speed = rows_per_s(job, now)
    return Cell(fmt.rate(speed) if speed else fmt.NOTHING)


def _while_working(text: Callable[[Job], str]) -> Callable[[Job, float, int], Cell]:
    """A cell that is empty once the job has ended."""
    return lambda job, now, width: Cell(text(job) if is_working(job) else fmt.NOTHING)


_remaining = _while_working(lambda job: count_items(job, num_remaining(job)))
_peers = _while_working(lambda job: fmt.count(job.changed.peers))
_leased = _while_working(lambda job: fmt.count(job.changed.leased))


def _job(job: Job, now: float, width: int) -> Cell:
    return Cell(fmt.truncate(job.changed.job, width))


def _units(job: Job, now: float, width: int) -> Cell:
    return Cell(fmt.count(job.changed.units))


def _up(job: Job, now: float, width: int) -> Cell:
    return Cell(fmt.format_bytes(job.changed.bytes_up))


def _down(job: Job, now: float, width: int) -> Cell:
    return Cell(fmt.format_bytes(job.changed.bytes_down) if job.changed.bytes_down else fmt.NOTHING)


def _outcome(job: Job, now: float, width: int) -> Cell:
    return Cell(fmt.truncate(job.changed.ended_because or job.changed.task, width), "quiet")


#: Key, title, minimum and maximum width, minimum terminal width; the last ones are dropped first.
COLUMNS: tuple[Column[Job], ...] = (
    Column("state", "State", 10, 12, 0, state_cell),
    Column("job", "Job", 14, 18, 0, _job),
    Column("done", "Done", 11, 24, 0, _done),
    Column("left", "Left", 10, 12, 0, _remaining, right=True),
    Column("took", "Time", 6, 6, 80, _duration, right=True),
    Column("speed", "Rows/s", 7, 7, 80, _speed, right=True),
    Column("peers", "Peers", 5, 5, 120, _peers, right=True),
    Column("outcome", "Outcome", 20, 60, 120, _outcome),
    Column("up", "Up", 7, 7, 120, _up, right=True),
    Column("down", "Down", 7, 7, 120, _down, right=True),
    Column("hand", "Leased", 7, 7, 160, _leased, right=True),
    Column("units", "Units", 6, 6, 160, _units, right=True),
)


# --- one job ---------------------------------------------------------------------------------


def describe_job(job: Job, fleet: Fleet, now: float) -> list[tuple[str, Cell]]:
    """Everything known about a job: (label, cell), the most important first."""
    changed = job.changed
    state = state_cell(job, now)
    ago = f" {fmt.age(now - job.ended_at)} ago" if job.ended_at else ""
    because = f": {changed.ended_because}" if changed.ended_because else ""
    kind = KINDS.get(changed.kind, changed.kind)
    num_done = 0 if is_unanswered(job) else changed.done
    done = f"{num_done:,} of {count_items(job, changed.total)}"
    if is_working(job):
        done += f" · {fmt.count(changed.leased)} leased to {fmt.plural(changed.peers, 'peer')}"
        done += f" · {fmt.count(num_remaining(job))} left"
    rows = f"{changed.rows:,} rows in {fmt.plural(changed.units, 'unit')}"
    speed, took = rows_per_s(job, now), duration_s(job, now)
    rows += f" · {fmt.rate(speed)}" if speed else ""
    rows += f" · {fmt.duration(took)}" if took is not None else ""
    traffic = f"{fmt.format_bytes(changed.bytes_up)} of answers up"
    traffic += (
        f" · {fmt.format_bytes(changed.bytes_down)} of rows down" if changed.bytes_down else ""
    )
    lines = [
        ("state", Cell(f"{state.text}{ago}{because}", state.tone)),
        ("kind", Cell(f"{kind} · {changed.task}" if changed.task else kind)),
        ("done", Cell(done)),
        ("answered", Cell(rows)),
        ("bytes", Cell(traffic)),
    ]
    if changed.dropped:
        lines.append(("dropped", Cell(f"{fmt.plural(changed.dropped, 'answer')} rejected", "warn")))
    for peer, reason in changed.excused.items():
        lines.append(("excused", Cell(f"{peer_name(fleet, peer)}: {reason}", "warn")))
    if (more := changed.num_excused - len(changed.excused)) > 0:
        lines.append(("excused", Cell(f"and {fmt.count(more)} more", "warn")))
    return lines
