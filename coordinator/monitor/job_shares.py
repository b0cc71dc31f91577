"""What each peer does in a job, for operators, as lines of cells. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from coordinator.fleet.state import Fleet, Job
from coordinator.jobs.messages import JobShare
from coordinator.monitor.job_table import is_working
from coordinator.monitor.peer_table import Cell, Tone, peer_name
from coordinator.remote import formatting as fmt

NAME_WIDTH, STATE_WIDTH = 20, 12
#: Title and width of the columns of numbers.
_NUMBERS = (("Units", 6), ("Leased", 6), ("Rows", 8), ("Rows/s", 7), ("Bytes", 7))


class Shares(NamedTuple):
    """By peer, what it does in the job `job`. `error`: why this could not be read."""

    job: str = ""
    by_peer: Mapping[str, JobShare] = {}
    error: str = ""


def job_key(job: Job) -> tuple[object, ...]:
    """What changes when the share of some peer may have changed."""
    changed = job.changed
    return changed.state, changed.units, changed.leased, changed.rows, changed.num_excused


def share_lines(
    shares: Shares, job: Job, fleet: Fleet, width: int, height: int
) -> list[list[Cell]]:
    """A line for each peer, those with most rows first, after titles; the last counts the rest."""
    if shares.job != job.changed.job:
        return [[Cell("asking the coordinator…", "quiet")]]
    if not shares.by_peer:
        return [[Cell(shares.error or "no peer has a part in this job yet", "quiet")]]
    ranked = sorted(
        shares.by_peer.items(),
        key=lambda item: (bool(item[1].excused), -item[1].rows, peer_name(fleet, item[0])),
    )
    room = max(height - 1, 1)
    shown = ranked if len(ranked) <= room else ranked[: room - 1]
    most = max((share.rows for _, share in ranked), default=0)
    lines = [_titles(width)]
    lines += [_line(peer_name(fleet, peer), share, job, most, width) for peer, share in shown]
    if len(shown) < len(ranked):
        lines.append([Cell(f"and {len(ranked) - len(shown)} more peers", "quiet")])
    return lines


def _titles(width: int) -> list[Cell]:
    numbers = "".join(f"{title:>{wide + 2}}" for title, wide in _NUMBERS)
    text = f"{'Peer':<{NAME_WIDTH}}  {'State':<{STATE_WIDTH}}{numbers}"
    return [Cell(fmt.truncate(text, width), "quiet")]


def _line(name: str, share: JobShare, job: Job, most: int, width: int) -> list[Cell]:
    state, tone = _state(share, job)
    name = f"{fmt.truncate(name, NAME_WIDTH):<{NAME_WIDTH}}  "
    if share.excused:
        room = max(width - len(name), 1)
        return [Cell(name), Cell(fmt.truncate(f"{state}: {share.excused}", room), tone)]
    values = (
        *(fmt.count(share.units), fmt.count(share.leased), fmt.count(share.rows)),
        fmt.rate(share.rows_per_s) if share.rows_per_s else fmt.NOTHING,
        fmt.format_bytes(share.nbytes) if share.nbytes else fmt.NOTHING,
    )
    numbers = "".join(
        f"{value:>{wide + 2}}" for value, (_, wide) in zip(values, _NUMBERS, strict=True)
    )
    room = width - len(name) - STATE_WIDTH - len(numbers) - 3
    bar = "━" * max(share.rows * room // most, 1) if most and share.rows and room > 3 else ""
    cells = [Cell(name), Cell(f"{state:<{STATE_WIDTH}}", tone), Cell(numbers)]
    return [*cells, *([Cell(f"   {bar}", "busy")] if bar else [])]


def _state(share: JobShare, job: Job) -> tuple[str, Tone]:
    if share.excused:
        return "✕ takes no part", "warn"
    if share.leased and is_working(job):
        return "● working", "good"
    return ("✓ answered", "plain") if share.units else ("○ no answer", "quiet")
