"""What the pages have in common: how the app draws them and what its keys change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from textual import on
from textual.containers import Vertical
from textual.events import Resize
from textual.message import Message

from coordinator.fleet.state import Event, Fleet
from coordinator.monitor.fleet_layout import BORDER, is_roomy
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.export import Row
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.operator_details import OperatorDetails
from protocols.errors import CommonweightError


class Frame(NamedTuple):
    """What a page draws, at `now` (Unix s). Only `dirty` peers have changed; anything if None.

    `details`: what only operators get.
    """

    fleet: Fleet | None
    now: float
    dirty: Iterable[str] | None = None
    events: Callable[[], Sequence[Event]] = list
    details: OperatorDetails | None = None


class Page(Vertical):
    """One page. The app calls `draw` for new data and `refresh_ages` once a second."""

    class ViewChanged(Message):
        """The page must be drawn again: its size or what it shows has changed."""

    def __init__(self, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self.faults_only = False
        #: The cursor stays with its peer, or on the newest line.
        self.follow = True
        self.zoomed = False
        #: Why there is no fleet yet.
        self.error: CommonweightError | None = None
        self._fleet: Fleet | None = None
        self._now = 0.0  # Unix s

    @property
    def table(self) -> CellTable:
        raise NotImplementedError

    @property
    def border(self) -> int:
        """The characters that the borders of a part take; 0 on a small terminal."""
        return BORDER if is_roomy(*self.app.size) else 0

    @property
    def view_text(self) -> str:
        """How the view differs from the default one."""
        return ""

    @property
    def copy_text(self) -> str:
        """The id or the text under the cursor, for the clipboard; "" without one."""
        return ""

    def export_rows(self) -> tuple[str, list[Row]]:
        """The name for the files, and the rows that the page shows."""
        raise NotImplementedError

    def draw(self, frame: Frame) -> None:
        raise NotImplementedError

    def refresh_ages(self, now: float) -> None:
        """Draw again what depends on the time."""
        self._now = now

    def invalidate(self) -> None:
        """Drop what was drawn: the colors have changed."""
        self.table.refresh()

    def redraw(self) -> None:
        """Ask the app to draw the page."""
        self.post_message(self.ViewChanged())

    def on_resize(self, event: Resize) -> None:
        self.call_after_refresh(self.redraw)


class FilterPage(Page):
    """A page with a filter bar."""

    @property
    def bar(self) -> FilterBar:
        return self.query_one(FilterBar)

    def reset_view(self) -> None:
        """Show everything again."""
        self.bar.clear()
        self.faults_only, self.follow = False, True
        self.table.focus()
        self.redraw()

    @on(FilterBar.Changed)
    def _filter_changed(self) -> None:
        self.redraw()

    @on(FilterBar.Submitted)
    def _filter_submitted(self) -> None:
        self.table.focus()
