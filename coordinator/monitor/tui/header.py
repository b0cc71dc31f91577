"""The header: where the run stands, who is there, and whether the links are up. Always seen."""

from __future__ import annotations

from rich.text import Text
from textual.widget import Widget

from coordinator.fleet.reducer import current_run, num_available, num_enrolled
from coordinator.monitor.peer_table import Cell, status_dot
from coordinator.monitor.tui.theme import colors, styles
from coordinator.remote.follower import FleetFollower
from coordinator.remote.formatting import age, truncate
from protocols.messages.states import ENDED


class Header(Widget):
    """One line, shortened from its left end: the lights and the age stay to the last."""

    DEFAULT_CSS = "Header { height: 1; padding: 0 1; background: $panel; }"

    def __init__(self, following: FleetFollower, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._following = following
        self.now = 0.0

    def render(self) -> Text:
        return header_line(self._following, self.now, self.content_size.width)


def header_line(following: FleetFollower, now: float, width: int) -> Text:
    """The header's text in at most `width` characters where that is possible."""
    segments = _segments(following, now)
    separator = " · "

    def total() -> int:
        texts = [forms[0].text for forms in segments if forms[0].text]
        return sum(map(len, texts)) + len(separator) * (len(texts) - 1)

    # One form less at a time, the least important segment first.
    for index in (0, 1, 6, 0, 3, 2, 1, 3, 2, 1, 6):
        if total() <= width:
            break
        if len(segments[index]) > 1:
            segments[index].pop(0)
    line = Text(no_wrap=True, end="", overflow="ellipsis")
    for forms in segments:
        if forms[0].text:
            if line:
                line.append(separator, colors().faint)
            line.append(forms[0].text, styles()[forms[0].tone])
    return line


def _segments(following: FleetFollower, now: float) -> list[list[Cell]]:
    """For each segment its forms, from the longest to none at all."""
    fleet = following.fleet
    run = current_run(fleet) if fleet else None
    forms: list[list[Cell]] = [[Cell("commonweight", "strong"), Cell("")], [Cell("")], [Cell("")]]
    forms.append([Cell("")])
    if fleet:
        here, all_peers = num_available(fleet, now), num_enrolled(fleet)
        forms[2] = [Cell(f"{here}/{all_peers} peers"), Cell(f"{here}/{all_peers}")]
        name = fleet.name or fleet.fleet
        forms[0] = [
            Cell(truncate(name, 20), "strong"),
            Cell(truncate(name, 10), "strong"),
            Cell(""),
        ]
    if fleet and run:
        changed = run.changed
        name = changed.run
        forms[0] = [
            Cell(truncate(name, 24), "strong"),
            Cell(truncate(name, 12), "strong"),
            Cell(""),
        ]
        forms[1] = [
            Cell(f"round {changed.round}/{changed.rounds}"),
            Cell(f"{changed.round}/{changed.rounds}"),
        ]
        met = here >= changed.quorum
        ended = changed.state in ENDED
        quorum, tone = f"{changed.quorum} {'✓' if met else '✕'}", "good" if met else "bad"
        forms[3] = [Cell(f"quorum {quorum}", tone), Cell(f"q {quorum}", tone), Cell("")]  # type: ignore[arg-type]
        if ended:
            forms[3] = [Cell(changed.state.value, "strong")]
    links = fleet.links if fleet else None
    mqtt = following.stream and (links is None or links.mqtt)
    flower = following.connected and links is not None and links.flower
    forms.append([_link_cell("mqtt", mqtt)])
    forms.append([_link_cell("flower", flower)])
    if following.fresh_at:
        old = f"{age(now - following.fresh_at)} old"
        tone = "quiet" if following.connected else "warn"
        bare = Cell(old.removesuffix(" old"), tone)  # type: ignore[arg-type]
        forms.append([Cell(f"data {old}", tone), Cell(old, tone), bare])  # type: ignore[arg-type]
    else:
        forms.append([Cell("no data yet", "warn"), Cell("no data", "warn")])
    return forms


def _link_cell(name: str, up: bool) -> Cell:
    return Cell(f"{name} {status_dot(up)}", "good" if up else "warn")
