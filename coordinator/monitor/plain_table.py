"""The fleet as a plain table, for `--once` and for output that is not a terminal."""

from __future__ import annotations

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from coordinator.fleet.readings import (
    current_run,
    num_available,
    num_enrolled,
    num_without_presence,
)
from coordinator.fleet.state import Fleet
from coordinator.monitor.peer_table import COLUMNS, Tone, select_peers
from coordinator.monitor.round_table import describe_run, seconds_left
from coordinator.remote.formatting import age

STYLES: dict[Tone, str] = {
    "plain": "",
    "quiet": "dim",
    "edge": "dim",
    "good": "green",
    "busy": "cyan",
    "warn": "yellow",
    "bad": "red",
    "ask": "magenta",
    "strong": "bold",
}
#: Blanks between two columns.
COLUMN_GAP = 3
_SHOWN = ("state", "peer", "round", "seen", "loss", "trend", "sent", "version")


def plain_table(fleet: Fleet, now: float, heading: str = "", *, width: int | None = None) -> Table:
    """Every peer in one table, those that need attention first, below `heading` and the run.

    Columns that do not fit `width` characters are left out, the last ones first; state and peer
    stay.
    """
    run = current_run(fleet)
    summary = f"{num_available(fleet, now)}/{num_enrolled(fleet)} peers"
    if missing := num_without_presence(fleet):
        summary += f" · {missing} without MQTT presence"
    left = seconds_left(run) if run else None
    summary += "" if left is None else f" · about {age(left)} left"
    if fleet.links.why:
        summary += f" · MQTT: {fleet.links.why}"
    parts = [heading, describe_run(run) if run else "", summary]
    title = Text(" · ".join(filter(None, parts)), style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in COLUMNS if column.key in _SHOWN]
    peers = select_peers(fleet, now)
    rows = [[column.cell(peer, now, column.max_width) for column in columns] for peer in peers]
    widths = [
        max(cell_len(text) for text in (column.title, *(row[n].text for row in rows)))
        for n, column in enumerate(columns)
    ]
    while (
        width is not None and len(widths) > 2 and sum(widths) + COLUMN_GAP * len(widths) > width + 1
    ):
        widths.pop()
    for column in columns[: len(widths)]:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell.text, style=STYLES[cell.tone]) for cell in row[: len(widths)]))
    return table
