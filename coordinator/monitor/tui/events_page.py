"""The Events page: all events of the fleet and of this monitor, the newest at the bottom."""

from __future__ import annotations

import textwrap
from datetime import datetime, tzinfo

from rich.text import Text
from textual.app import ComposeResult
from textual.events import Resize
from textual.widgets import Static

from coordinator.fleet.state import Event
from coordinator.monitor.peer_table import LEVELS
from coordinator.monitor.tui.export import Row, event_rows
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.page import FilterPage, Frame
from coordinator.monitor.tui.row_table import RowTable
from coordinator.monitor.tui.theme import colors, styles

MAX_EVENTS = 500
_TEXT_INDENT = 17  # time, glyph and the blanks around them


class EventsPage(FilterPage):
    """Follows the newest line while `follow`; `enter` opens the peer of a line."""

    def __init__(self, zone: tzinfo | None = None) -> None:
        super().__init__("events")
        self._zone = zone
        self._drawn: list[Event] = []

    def compose(self) -> ComposeResult:
        yield FilterBar("words in the text")
        yield Static("Nothing has happened yet.", id="no-events")
        yield RowTable(id="event-table", show_header=False)

    @property
    def table(self) -> RowTable:
        return self.query_one("#event-table", RowTable)

    @property
    def current_event(self) -> Event | None:
        """The event under the cursor."""
        row = self.table.cursor_row
        return self._drawn[row] if 0 <= row < len(self._drawn) else None

    @property
    def copy_text(self) -> str:
        return self.current_event.text if self.current_event else ""

    def export_rows(self) -> tuple[str, list[Row]]:
        return "events", event_rows(self._drawn)

    @property
    def view_text(self) -> str:
        parts = [f"filter: {self.bar.text}"] if self.bar.text else []
        parts += ["warnings and errors"] if self.faults_only else []
        parts += [] if self.follow else ["not following: f"]
        return " · ".join(parts)

    def draw(self, frame: Frame) -> None:
        """Show the events, in order of time; lines that are already there stay."""
        matches = self.bar.matcher()
        shown = [
            event
            for event in frame.events()
            if not (self.faults_only and event.level == "info") and matches(event.text)
        ][-MAX_EVENTS:]
        table, old = self.table, self._drawn
        if not table.columns:
            for width in (8, 1, self._text_width):
                table.add_column("", width=width)
        gone = next((n for n, event in enumerate(old) if shown and event is shown[0]), len(old))
        if shown[: len(old) - gone] != old[gone:]:
            gone = len(old)
        if gone == len(old):
            table.clear()
        else:
            for key in list(table.rows)[:gone]:
                table.remove_row(key)
        for event in shown[len(old) - gone :]:
            self._add(event)
        self._drawn = shown
        if self.follow and shown and shown != old:
            table.move_cursor(row=len(shown) - 1, animate=False)
        self.query_one("#no-events").display = not shown
        table.display = bool(shown)

    @property
    def _text_width(self) -> int:
        return max(self.size.width - _TEXT_INDENT, 10)

    def _add(self, event: Event) -> None:
        glyph, tone = LEVELS[event.level]
        lines = textwrap.wrap(event.text, self._text_width) or [""]
        style = colors().text if event.level == "info" else styles()[tone]
        self.table.add_row(
            Text(format_time(event.at, self._zone), colors().dim),
            Text(glyph, styles()[tone]),
            Text("\n".join(lines), style),
            height=len(lines),
        )

    def invalidate(self) -> None:
        self._drawn = []
        self.table.clear(columns=True)

    def on_resize(self, event: Resize) -> None:
        self.invalidate()
        super().on_resize(event)


def format_time(at: float, zone: tzinfo | None) -> str:
    """`14:03:22`, in the local time zone or in `zone`."""
    try:
        return datetime.fromtimestamp(at, zone).strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "--:--:--"
