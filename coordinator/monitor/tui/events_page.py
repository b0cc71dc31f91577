"""The Events page: everything that was said, toasts too, the newest at the foot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime, tzinfo

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Resize
from textual.message import Message
from textual.widgets import Static

from coordinator.fleet.reducer import Event
from coordinator.monitor.peer_table import LEVELS
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.row_table import RowTable
from coordinator.monitor.tui.theme import colors, styles

MAX_EVENTS = 500
_TEXT_INDENT = 17  # time, sign and the blanks around them


class EventsPage(Vertical):
    """It follows the newest line while `follow`; `enter` goes to the peer of a line."""

    class ViewChanged(Message):
        """The view was changed: draw it."""

    def __init__(self, zone: tzinfo | None = None) -> None:
        super().__init__(id="events")
        self.faults_only = False
        self.follow = True
        self._zone = zone
        self._drawn: list[Event] = []

    def compose(self) -> ComposeResult:
        yield FilterBar("words in the text")
        yield Static("Nothing has happened yet.", id="silence")
        yield RowTable(id="said", show_header=False)

    @property
    def table(self) -> RowTable:
        return self.query_one("#said", RowTable)

    @property
    def bar(self) -> FilterBar:
        return self.query_one(FilterBar)

    @property
    def shown(self) -> Sequence[Event]:
        """The events in the table."""
        return self._drawn

    @property
    def current_event(self) -> Event | None:
        """The event under the cursor."""
        row = self.table.cursor_row
        return self._drawn[row] if 0 <= row < len(self._drawn) else None

    @property
    def view_text(self) -> str:
        """How this view differs from the plain one, in words."""
        parts = [f"filter: {self.bar.text}"] if self.bar.text else []
        parts += ["warnings and errors"] if self.faults_only else []
        parts += [] if self.follow else ["not following: f"]
        return " · ".join(parts)

    def draw(self, events: Sequence[Event]) -> None:
        """Show `events`, in order of time; lines that stand already are left alone."""
        words = self.bar.text.casefold().split()
        chosen = [
            event
            for event in events
            if not (self.faults_only and event.level == "info")
            and all(word in event.text.casefold() for word in words)
        ][-MAX_EVENTS:]
        table, old = self.table, self._drawn
        if not table.columns:
            for width in (8, 1, max(self.size.width - _TEXT_INDENT, 10)):
                table.add_column("", width=width)
        gone = next((n for n, event in enumerate(old) if chosen and event is chosen[0]), len(old))
        if chosen[: len(old) - gone] != old[gone:]:
            gone = len(old)
        if gone == len(old):
            table.clear()
        else:
            for key in list(table.rows)[:gone]:
                table.remove_row(key)
        for event in chosen[len(old) - gone :]:
            self._add(event)
        self._drawn = chosen
        if self.follow and chosen and chosen != old:
            table.move_cursor(row=len(chosen) - 1, animate=False)
        self.query_one("#silence").display = not chosen
        table.display = bool(chosen)

    def _add(self, event: Event) -> None:
        glyph, tone = LEVELS[event.level]
        lines = textwrap.wrap(event.text, max(self.size.width - _TEXT_INDENT, 10)) or [""]
        ink = colors().text if event.level == "info" else styles()[tone]
        self.table.add_row(
            Text(format_time(event.at, self._zone), colors().dim),
            Text(glyph, styles()[tone]),
            Text("\n".join(lines), ink),
            height=len(lines),
        )

    def invalidate(self) -> None:
        """The next drawing begins anew: the width or the colours are others."""
        self._drawn = []
        self.table.clear(columns=True)

    def reset_view(self) -> None:
        """Back to the plain view."""
        self.bar.clear()
        self.faults_only, self.follow = False, True
        self.table.focus()
        self.post_message(self.ViewChanged())

    def on_resize(self, event: Resize) -> None:
        self.invalidate()
        self.call_after_refresh(self.post_message, self.ViewChanged())

    @on(FilterBar.Changed)
    def _filter_changed(self) -> None:
        self.post_message(self.ViewChanged())

    @on(FilterBar.Submitted)
    def _filter_done(self) -> None:
        self.table.focus()


def format_time(at: float, zone: tzinfo | None) -> str:
    """`14:03:22`, by this machine's clock unless `zone` says otherwise."""
    try:
        return datetime.fromtimestamp(at, zone).strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "--:--:--"
