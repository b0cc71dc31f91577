"""A table that draws only visible rows, directly from its data.

Textual's DataTable stores and lays out every cell: 2,000 peers that report every second cost it
seconds. Here a hidden row costs only its id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from coordinator.monitor.peer_table import GAP, Cell, Column
from coordinator.monitor.tui.theme import colors, styles
from protocols.local.terminal_text import fit_width


class CellTable(ScrollView, can_focus=True):
    """`cell(row_id, column, width)` returns a cell; a header stays on top.

    `set_rows` changes rows and columns together, so no line mixes old and new ones.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"cells--cursor", "cells--hover"}
    DEFAULT_CSS = """
    CellTable { overflow-x: hidden; }
    CellTable > .cells--cursor { background: $block-cursor-background; }
    CellTable > .cells--hover { background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j,down", "move(1)", "Down", show=False),
        Binding("k,up", "move(-1)", "Up", show=False),
        Binding("pagedown,ctrl+f", "page(1)", "Page down", show=False),
        Binding("pageup,ctrl+b", "page(-1)", "Page up", show=False),
        Binding("home,g", "edge(-1)", "First row", show=False),
        Binding("end,G", "edge(1)", "Last row", show=False),
        Binding("enter", "choose", "Open", show=False),
    ]

    cursor_row: reactive[int] = reactive(0)
    """The row under the cursor."""

    class RowSelected(Message):
        """Enter, or a click on the row under the cursor."""

        def __init__(self, table: CellTable) -> None:
            super().__init__()
            self.table = table

        @property
        def control(self) -> CellTable:
            return self.table

    class RowHighlighted(Message):
        """The cursor has moved to another row."""

    class HeaderSelected(Message):
        """A click on the header of a column."""

        def __init__(self, column: str) -> None:
            super().__init__()
            self.column = column

    def __init__(
        self,
        cell: Callable[[str, Column[Any], int], Cell],
        *,
        id: str,  # noqa: A002
        show_header: bool = True,
    ) -> None:
        super().__init__(id=id)
        self._cell = cell
        self._header_lines = int(show_header)
        self.columns: list[tuple[Column[Any], int]] = []
        self._sorted = ("", False)
        self.row_ids: list[str] = []
        self._base = Style()

    def set_rows(
        self,
        order: list[str],
        columns: list[tuple[Column[Any], int]],
        sort_by: str = "",
        *,
        reverse: bool = False,
    ) -> None:
        """Show these rows, sorted by the column `sort_by`; the cursor stays in range."""
        self.row_ids, self.columns, self._sorted = order, columns, (sort_by, reverse)
        size = Size(self.size.width, len(order) + self._header_lines)
        if self.virtual_size != size:
            self.virtual_size = size
        self.cursor_row = min(self.cursor_row, max(len(order) - 1, 0))
        self.refresh()

    @property
    def row_count(self) -> int:
        return len(self.row_ids)

    @property
    def current_id(self) -> str | None:
        """The id in the row under the cursor."""
        return self.row_ids[self.cursor_row] if self.cursor_row < len(self.row_ids) else None

    # --- drawing ---

    def render_lines(self, crop: Region) -> list[Strip]:
        self._base = self.rich_style  # once per frame: it combines the styles of all ancestors
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        width, base = self.size.width, self._base
        if y < self._header_lines:
            dim = Style(color=colors().dim)
            titles = [Cell(self._title(column, wide)) for column, wide in self.columns]
            return self._line(titles, base, width, dim)
        row = self.scroll_offset.y + y - self._header_lines
        if row >= len(self.row_ids):
            return Strip.blank(width, base)
        if row == self.cursor_row:
            base += self.get_component_rich_style("cells--cursor", partial=True)
        cells = [self._cell(self.row_ids[row], column, wide) for column, wide in self.columns]
        return self._line(cells, base, width)

    def _line(
        self, cells: Sequence[Cell], base: Style, width: int, only: Style | None = None
    ) -> Strip:
        tones, segments, used = styles(), [], 0
        for cell, (column, wide) in zip(cells, self.columns, strict=True):
            text = fit_width(cell.text, wide, right=column.right)
            style = only or (tones[cell.tone] if cell.tone != "plain" else None)
            segments.append(Segment(f" {text} ", base + style if style else base))
            used += wide + GAP
        segments.append(Segment(" " * max(width - used, 0), base))
        return Strip(segments, max(width, used)).crop(0, width)

    def _title(self, column: Column[Any], width: int) -> str:
        """The title; the column that the rows are sorted by has an arrow if it fits."""
        sort_by, reverse = self._sorted
        if column.key != sort_by or len(column.title) + 2 > width:
            return column.title
        arrow = "↑" if reverse else "↓"
        return f"{arrow} {column.title}" if column.right else f"{column.title} {arrow}"

    # --- cursor ---

    def move_cursor(self, row: int) -> None:
        """Move the cursor, and scroll the row into view."""
        self.cursor_row = min(max(row, 0), max(len(self.row_ids) - 1, 0))

    def watch_cursor_row(self, row: int) -> None:
        # The header covers the first line, so row n is on line n + 1.
        top, room = self.scroll_offset.y, max(self.size.height - self._header_lines, 1)
        if row < top:
            self.scroll_to(y=row, animate=False, force=True)
        elif row >= top + room:
            self.scroll_to(y=row - room + 1, animate=False, force=True)
        self.refresh()
        self.post_message(self.RowHighlighted())

    def action_move(self, step: int) -> None:
        self.move_cursor(self.cursor_row + step)

    def action_page(self, step: int) -> None:
        self.move_cursor(self.cursor_row + step * max(self.size.height - 2, 1))

    def action_edge(self, way: int) -> None:
        self.move_cursor(len(self.row_ids) if way > 0 else 0)

    def action_choose(self) -> None:
        self.post_message(self.RowSelected(self))

    def on_click(self, event: Click) -> None:
        if (at := event.get_content_offset(self)) is None:  # on the border
            return
        row = self.scroll_offset.y + at.y - self._header_lines
        if at.y < self._header_lines:
            self._click_title(at.x)
        elif row >= len(self.row_ids):
            return
        elif row == self.cursor_row:
            self.action_choose()
        else:
            self.move_cursor(row)

    def _click_title(self, x: int) -> None:
        for column, wide in self.columns:
            if x < wide + GAP:
                self.post_message(self.HeaderSelected(column.key))
                return
            x -= wide + GAP

    def scroll_to_region(self, region: Region, **_: object) -> object:  # type: ignore[override]
        """Do nothing: the cursor scrolls the table, not the focus."""
        return None
