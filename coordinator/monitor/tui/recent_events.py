"""The latest events in a few lines, where a page has room for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import tzinfo

from rich.text import Text
from textual.widget import Widget

from coordinator.fleet.state import Event
from coordinator.monitor.peer_table import LEVELS
from coordinator.monitor.tui.theme import colors, styles
from coordinator.monitor.tui.times import format_time


class RecentEvents(Widget):
    """One line per event, the newest at the bottom; above the title `Latest` without a border."""

    DEFAULT_CSS = "RecentEvents { padding: 0 1; }"

    def __init__(self, zone: tzinfo | None, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self.events: Sequence[Event] = ()
        self.has_title = True
        self.border_title = "Latest"
        self._zone = zone

    def render(self) -> Text:
        lines = [Text("Latest", f"bold {colors().text}")] if self.has_title else []
        room = max(self.content_size.height - len(lines), 0)
        for event in self.events[len(self.events) - min(room, len(self.events)) :]:
            glyph, tone = LEVELS[event.level]
            line = Text(format_time(event.at, self._zone), colors().dim, no_wrap=True)
            ink = colors().dim if event.level == "info" else styles()[tone]
            line.append(f" {glyph} ", styles()[tone]).append(event.text, ink)
            line.truncate(self.content_size.width, overflow="ellipsis")
            lines.append(line)
        if not self.events:
            lines.append(Text("nothing has happened yet", colors().dim))
        return Text("\n").join(lines)
