"""The Events page: everything that was said, toasts too, the newest at the foot."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, tzinfo

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Resize
from textual.widgets import RichLog, Static

from coordinator.fleet import Event
from coordinator.rows import LEVELS
from coordinator.tui.theme import DIM, INK, STYLES

SHOWN_MOST = 1_000


class EventsPage(Vertical):
    """It follows the newest line as long as the foot is in sight."""

    def __init__(self, zone: tzinfo | None = None) -> None:
        super().__init__(id="events")
        self.faults = False
        self._zone = zone
        self._events: Sequence[Event] = ()
        self._drawn: list[Event] = []

    def compose(self) -> ComposeResult:
        yield Static("Nothing has happened yet.", id="silence")
        yield RichLog(
            id="said", wrap=True, min_width=0, max_lines=2 * SHOWN_MOST, auto_scroll=False
        )

    @property
    def log_view(self) -> RichLog:
        return self.query_one("#said", RichLog)

    def draw(self, events: Sequence[Event]) -> None:
        """Show `events`, in order of time; lines that stand already are left alone."""
        self._events = events
        if self.faults:
            events = [event for event in events if event.level != "info"]
        shown = list(events)[-SHOWN_MOST:]
        view = self.log_view
        at_foot = view.scroll_offset.y >= view.max_scroll_y
        if shown[: len(self._drawn)] != self._drawn:
            view.clear()
            self._drawn = []
        for event in shown[len(self._drawn) :]:
            view.write(self._line(event), scroll_end=at_foot)
        self._drawn = shown
        self.query_one("#silence").display = not shown

    def on_resize(self, event: Resize) -> None:
        """A log breaks its lines when they are written: write them again."""
        self._drawn = []
        self.log_view.clear()
        self.call_after_refresh(lambda: self.draw(self._events))

    def _line(self, event: Event) -> Table:
        """A grid, so that a long text is broken under itself and not under the time."""
        glyph, tone = LEVELS[event.level]
        line = Table.grid(padding=(0, 1))
        line.add_column(width=9, justify="right", style=DIM)
        line.add_column(width=1, style=STYLES[tone])
        line.add_column(style=INK if event.level == "info" else STYLES[tone])
        line.add_row(_clock_time(event.at, self._zone), glyph, Text(event.text))
        return line


def _clock_time(at: float, zone: tzinfo | None) -> str:
    try:
        return datetime.fromtimestamp(at, zone).strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "--:--:--"
