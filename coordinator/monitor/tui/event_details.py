"""Beside the list of events: the selected one in full, and how many there were of what."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import tzinfo

from rich.console import Group, RenderableType
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from coordinator.fleet.state import Event, Fleet
from coordinator.monitor.event_summary import (
    LEVEL_NAMES,
    count_levels,
    count_subjects,
    subject_name,
    subject_state,
    timeline,
)
from coordinator.monitor.peer_table import LEVELS, Cell
from coordinator.monitor.tui.plots import Plot, bar_list, stack_plot
from coordinator.monitor.tui.theme import Fact, colors, facts_table, styles
from coordinator.monitor.tui.times import format_date, format_time
from coordinator.remote.formatting import age

MIN_WIDTH, MAX_WIDTH = 40, 64
MIN_TIMELINE_LINES, MAX_TIMELINE_LINES = 6, 12


class EventDetails(Vertical):
    """Two panels. They are shown only where the page has room for them."""

    def __init__(self, zone: tzinfo | None) -> None:
        super().__init__(id="event-details")
        self._zone = zone
        self._counted: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        yield Static(id="event-facts")
        yield Static(id="event-counts")

    def show_event(self, event: Event | None, fleet: Fleet | None, now: float) -> None:
        """Show an event in full, and the present state of what it is about."""
        pane = self.query_one("#event-facts", Static)
        pane.border_title = "Event"
        if event is None:
            pane.update("")
            return
        glyph, tone = LEVELS[event.level]
        rows: list[Fact] = [
            ("time", f"{format_date(event.at, self._zone)}, {age(now - event.at)} ago"),
            ("level", Cell(f"{glyph} {event.level}", tone)),
            ("about", subject_name(event, fleet) or "the fleet"),
        ]
        if (state := subject_state(event, fleet, now)) is not None:
            rows.append(("now", state))
        parts: list[RenderableType] = [facts_table(rows), "", Text(event.text, colors().text)]
        if fleet is not None and event.subject in fleet.peers:
            parts += ["", Text.assemble(("enter", f"bold {colors().blue}"), " opens this peer")]
        pane.update(Group(*parts))

    def show_counts(self, events: Sequence[Event], fleet: Fleet | None) -> None:
        """Show how many events there were by level, over time, and by peer and run."""
        pane = self.query_one("#event-counts", Static)
        pane.border_title = "Counts"
        width, height = pane.content_size
        ends = (events[0], events[-1]) if events else ()
        drawn = (len(events), *ends, width, height, colors())
        if drawn == self._counted or width < 1:
            return
        self._counted = drawn
        levels, own = Text(no_wrap=True), styles()
        for level, number in count_levels(events).items():
            glyph, tone = LEVELS[level]
            plural = "" if level == "info" or number == 1 else "s"
            levels.append(f"{glyph} {number} {level}{plural}", own[tone]).append("   ")
        room = height - 2
        lines = [levels, Text()]
        if events and (tall := min(room // 2, MAX_TIMELINE_LINES)) >= MIN_TIMELINE_LINES:
            lines += [*_timeline(events, width, tall, self._zone), Text()]
        named = count_subjects(events, fleet)[: max(height - len(lines) - 1, 0)]
        if named:
            plot = Plot("By peer and run", width, height)
            most = named[0][1]
            bars = [(name, str(number), number / most) for name, number in named]
            lines += bar_list(plot, bars, colors().blue)
        pane.update(Group(*lines))


def _timeline(events: Sequence[Event], width: int, height: int, zone: tzinfo | None) -> list[Text]:
    """Bars of the numbers of events, with a color for each level."""
    found, own = timeline(events, max(width // 3, 1)), colors()
    plot = Plot("", width, height, fmt=lambda number: f"{number:.0f}")
    by_level = {"info": own.dim, "warning": own.yellow, "error": own.vermilion}
    lines = stack_plot(plot, [(by_level[level], found.counts[level]) for level in LEVEL_NAMES])
    title = Text.assemble(
        ("Over time", f"bold {own.text}"), (f"  a bar is {age(found.step_s)}", own.dim)
    )
    first, last = (format_time(end(event.at for event in events), zone) for end in (min, max))
    axis = Text(f"{first} to {last}", own.dim, no_wrap=True)
    return [title, *lines[1:-1], axis]
