"""The header: the run, the peers, and the connections.

Textual's Header shows only a title and a clock; this one needs a line that shortens with the width.
"""

from __future__ import annotations

from rich.text import Text
from textual.widget import Widget

from coordinator.fleet.readings import current_run, num_available, num_enrolled
from coordinator.monitor.peer_table import Cell, Tone, status_dot
from coordinator.monitor.tui.theme import colors, styles
from coordinator.remote.follower import FleetFollower
from coordinator.remote.formatting import age, truncate
from protocols.messages.states import ENDED

SEPARATOR = " · "
_EMPTY = Cell("")


class Header(Widget):
    """One line; the dots of the connections and the age of the data always stay."""

    DEFAULT_CSS = "Header { height: 1; padding: 0 1; background: $panel; }"

    def __init__(self, following: FleetFollower) -> None:
        super().__init__()
        self._following = following
        self.now = 0.0

    def render(self) -> Text:
        return header_line(self._following, self.now, self.content_size.width)


def header_line(following: FleetFollower, now: float, width: int) -> Text:
    """The header's text, shortened towards `width` characters."""
    segments = _segments(following, now)

    def shown() -> list[Cell]:
        return [forms[0] for forms in segments if forms[0].text]

    # Shorten one segment at a time, the least important first.
    for index in (0, 1, 6, 0, 3, 2, 1, 3, 2, 1, 6):
        if len(SEPARATOR.join(cell.text for cell in shown())) <= width:
            break
        if len(segments[index]) > 1:
            segments[index].pop(0)
    line = Text(SEPARATOR, colors().faint).join(
        Text(cell.text, styles()[cell.tone]) for cell in shown()
    )
    line.no_wrap, line.end, line.overflow = True, "", "ellipsis"
    return line


def _segments(following: FleetFollower, now: float) -> list[list[Cell]]:
    """The forms of each segment, from the longest to the shortest."""
    fleet = following.fleet
    current = current_run(fleet) if fleet else None
    run = current.changed if current else None
    title = [Cell("commonweight", "strong"), _EMPTY]
    rounds, peers, quorum = [_EMPTY], [_EMPTY], [_EMPTY]
    if fleet:
        online = num_available(fleet, now)
        count = f"{online}/{num_enrolled(fleet)}"
        peers = [Cell(f"{count} peers"), Cell(count)]
        name = run.run if run else fleet.name or fleet.fleet
        title = [Cell(truncate(name, 24), "strong"), Cell(truncate(name, 12), "strong"), _EMPTY]
        if run:
            rounds = [Cell(f"round {run.round}/{run.rounds}"), Cell(f"{run.round}/{run.rounds}")]
            met = online >= run.quorum
            tone: Tone = "good" if met else "bad"
            text = f"{run.quorum} {'✓' if met else '✕'}"
            quorum = [Cell(f"quorum {text}", tone), Cell(f"q {text}", tone), _EMPTY]
            if run.state in ENDED:
                quorum = [Cell(run.state.value, "strong")]
    links = fleet.links if fleet else None
    mqtt = following.stream and (links is None or links.mqtt)
    flower = following.connected and links is not None and links.flower
    data = [Cell("no data yet", "warn"), Cell("no data", "warn")]
    if following.fresh_at:
        old = age(now - following.fresh_at)
        fresh: Tone = "quiet" if following.connected else "warn"
        data = [Cell(text, fresh) for text in (f"data {old} old", f"{old} old", old)]
    return [title, rounds, peers, quorum, [_link("mqtt", mqtt)], [_link("flower", flower)], data]


def _link(name: str, up: bool) -> Cell:
    return Cell(f"{name} {status_dot(up)}", "good" if up else "warn")
