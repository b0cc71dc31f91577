"""The Events page: all events of the fleet and of this monitor, the newest at the bottom."""

from __future__ import annotations

import textwrap
from datetime import tzinfo
from functools import lru_cache
from typing import NamedTuple

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

from coordinator.fleet.state import Event
from coordinator.monitor.fleet_layout import MIN_WIDE_TERMINAL
from coordinator.monitor.peer_table import LEVELS, Cell, Column
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.event_details import MAX_WIDTH, MIN_WIDTH, EventDetails
from coordinator.monitor.tui.export import Row, event_rows
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.page import FilterPage, Frame
from coordinator.monitor.tui.times import format_time

MAX_EVENTS = 500
_TEXT_INDENT = 17  # time, glyph and the blanks around them


class Line(NamedTuple):
    """A line of the table: a long event takes several, and the first has its time and level."""

    event: Event
    text: str
    is_first: bool


class EventsPage(FilterPage):
    """Follows the newest line while `follow`; `enter` opens the peer of a line."""

    def __init__(self, zone: tzinfo | None = None) -> None:
        super().__init__("events")
        self._zone = zone
        self._events: list[Event] = []
        self._lines: list[Line] = []

    def compose(self) -> ComposeResult:
        yield FilterBar("words in the text")
        yield Static("Nothing has happened yet.", id="no-events")
        with Horizontal(id="event-sides"):
            yield CellTable(self._cell, id="event-table", show_header=False)
            yield EventDetails(self._zone)

    @property
    def table(self) -> CellTable:
        return self.query_one("#event-table", CellTable)

    @property
    def current_event(self) -> Event | None:
        """The event under the cursor."""
        row = self.table.current_id
        return None if row is None or int(row) >= len(self._lines) else self._lines[int(row)].event

    @property
    def copy_text(self) -> str:
        return self.current_event.text if self.current_event else ""

    def export_rows(self) -> tuple[str, list[Row]]:
        return "events", event_rows(self._events)

    @property
    def view_text(self) -> str:
        parts = [f"filter: {self.bar.text}"] if self.bar.text else []
        parts += ["warnings and errors"] if self.faults_only else []
        parts += [] if self.follow else ["not following: f"]
        return " · ".join(parts)

    def draw(self, frame: Frame) -> None:
        """Show the events, in order of time."""
        matches, old = self.bar.matcher(), self._events
        known = frame.events()
        self._events = [
            event
            for event in known
            if not (self.faults_only and event.level == "info") and matches(event.text)
        ][-MAX_EVENTS:]
        self._fleet, self._now = frame.fleet, frame.now
        details = self.query_one(EventDetails)
        has_room = bool(self.border) and self.app.size.width >= MIN_WIDE_TERMINAL
        details.display = has_room and not self.zoomed and bool(self._events)
        beside = min(max(self.size.width // 3, MIN_WIDTH), MAX_WIDTH) if details.display else 0
        details.styles.width = beside
        width = max(self.size.width - beside - _TEXT_INDENT - self.border, 10)
        self._lines = [
            Line(event, text, number == 0)
            for event in self._events
            for number, text in enumerate(_wrap(event.text, width))
        ]
        columns = [
            (Column("time", "", 8, 8, 0, self._time), 8),
            (Column("level", "", 1, 1, 0, _level), 1),
            (Column("text", "", 10, width, 0, _text), width),
        ]
        self.table.set_rows([str(number) for number in range(len(self._lines))], columns)
        if self.follow and self._events != old:
            self.table.move_cursor(len(self._lines) - 1)
        of_all = f" of {len(known)}" if len(self._events) < len(known) else ""
        self.table.border_title = f"Events {len(self._events)}{of_all}"
        self.query_one("#no-events").display = not self._events
        self.query_one("#event-sides").display = bool(self._events)
        self._show_details()

    @on(CellTable.RowHighlighted)
    def _show_details(self) -> None:
        """Show the event under the cursor in full."""
        details = self.query_one(EventDetails)
        if details.display:
            details.show_event(self.current_event, self._fleet, self._now)
            details.show_counts(self._events, self._fleet)

    def refresh_ages(self, now: float) -> None:
        super().refresh_ages(now)
        self._show_details()

    def _cell(self, row: str, column: Column[Line], width: int) -> Cell:
        return column.cell(self._lines[int(row)], 0.0, width)

    def _time(self, line: Line, now: float, width: int) -> Cell:
        return Cell(format_time(line.event.at, self._zone) if line.is_first else "", "quiet")


def _level(line: Line, now: float, width: int) -> Cell:
    return Cell(*LEVELS[line.event.level]) if line.is_first else Cell("")


def _text(line: Line, now: float, width: int) -> Cell:
    return Cell(line.text, "plain" if line.event.level == "info" else LEVELS[line.event.level][1])


@lru_cache(2 * MAX_EVENTS)
def _wrap(text: str, width: int) -> tuple[str, ...]:
    return tuple(textwrap.wrap(text, width)) or ("",)
