"""Lines of cells as a widget: the cards of peers, and the picture of the network."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from coordinator.monitor.peer_table import Cell
from coordinator.monitor.tui.theme import styles


class CellLines(Widget):
    """Draws lines of cells. Textual needs far longer to split one Text into lines."""

    lines: Sequence[Sequence[Cell]] = ()

    def show(self, lines: Sequence[Sequence[Cell]]) -> None:
        """Draw `lines` if they have changed."""
        if lines != self.lines:
            self.lines = lines
            self.refresh()

    def render_lines(self, crop: Region) -> list[Strip]:
        self._base = self.rich_style  # once per frame: it combines the styles of all ancestors
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        width, base, tones = self.content_size.width, self._base, styles()
        if y >= len(self.lines):
            return Strip.blank(width, base)
        segments = [Segment(cell.text, base + tones[cell.tone]) for cell in self.lines[y]]
        return Strip(segments).adjust_cell_length(width, base)
