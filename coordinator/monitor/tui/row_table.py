"""A DataTable with a row cursor and the keys of k9s and vi: j, k, g, G, home, end."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

#: Cached cells and lines: more than the largest terminal shows.
MAX_CACHED_CELLS, MAX_CACHED_LINES = 1_000, 150


class RowTable(DataTable[Text]):
    """Cells keep their colors under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False),
        Binding("k", "cursor_up", "Up", show=False),
        Binding("home,g", "scroll_top", "First row", show=False),
        Binding("end,G", "scroll_bottom", "Last row", show=False),
    ]

    def __init__(self, *, id: str, show_header: bool = True) -> None:  # noqa: A002
        super().__init__(
            cursor_type="row",
            cursor_foreground_priority="renderable",
            show_header=show_header,
            id=id,
        )
        self.cell_padding = 1
        # Every new row adds all visible cells to these caches again. Textual's limit of 10,000
        # cells would fill tens of megabytes with stale ones.
        self._cell_render_cache.maxsize = MAX_CACHED_CELLS
        self._row_render_cache.maxsize = self._line_cache.maxsize = MAX_CACHED_LINES
