"""The Fleet page: one row a peer, the run's plots beside it when the terminal is wide."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.message import Message
from textual.widgets import Static

from coordinator.fleet import Fleet, Peer, called, current_run
from coordinator.rows import SORTS, Cell, Column, chosen, fit
from coordinator.tui.filter_bar import FilterBar
from coordinator.tui.plots import Plots
from coordinator.tui.row_table import RowTable
from coordinator.tui.theme import colours, painted
from coordinator.words import cut

WIDE = 120
PLOTS_WIDTH = 36  # as in app.tcss


class FleetPage(Vertical):
    """Cells are changed in place: 2,000 rows are never built anew because one peer spoke."""

    class Viewed(Message):
        """The view was changed: draw it."""

    def __init__(self, *, read_only: bool = False) -> None:
        super().__init__(id="fleet")
        self.marked: set[str] = set()
        self.faults = False
        #: The cursor goes with its peer when the rows move, or stays in its place.
        self.follow = True
        self.by = "state"
        self.reverse = False
        self.zoomed = False
        self._keep: str | None = None
        self._read_only = read_only
        self._fleet: Fleet | None = None
        self._columns: list[tuple[Column, int]] = []
        self._cells: dict[str, list[Cell]] = {}
        self._order: list[str] = []

    def compose(self) -> ComposeResult:
        yield FilterBar("name, id, state or label")
        with Horizontal(id="sides"):
            yield RowTable(id="peers")
            yield Static(id="nothing")
            yield Plots(id="beside")

    def on_mount(self) -> None:
        self.query_one("#nothing").display = False
        self.query_one("#beside").display = False

    @property
    def table(self) -> RowTable:
        return self.query_one("#peers", RowTable)

    @property
    def words(self) -> str:
        """What the filter holds."""
        return self.bar.words

    @property
    def bar(self) -> FilterBar:
        return self.query_one(FilterBar)

    @property
    def under_cursor(self) -> str | None:
        """The id of the peer under the cursor."""
        row = self.table.cursor_row
        return self._order[row] if 0 <= row < len(self._order) else None

    @property
    def shown(self) -> list[str]:
        """The ids of the peers in the table, in order."""
        return list(self._order)

    def forget(self) -> None:
        """The next drawing begins anew: the colours are others."""
        self._columns = []

    @property
    def view(self) -> str:
        """How this view differs from the plain one, in words."""
        parts = [f"filter: {self.words}"] if self.words else []
        parts += ["faults only"] if self.faults else []
        if self.by != "state" or self.reverse:
            parts.append(f"by {self.by}{' ↑' if self.reverse else ' ↓'}")
        parts += [f"{len(self.marked)} marked"] if self.marked else []
        parts += [] if self.follow else ["in place: f"]
        return " · ".join(parts)

    # --- drawing ---

    def draw(self, fleet: Fleet | None, now: float, dirty: Iterable[str] | None) -> None:
        """Show `fleet`; only the cells of `dirty` peers are looked at, or all if it is None."""
        if fleet is not self._fleet:
            dirty, self._fleet = None, fleet
        if fleet is None:
            self._say_nothing(Text("Waiting for the coordinator…", colours().dim))
            return
        self.marked &= fleet.peers.keys()
        self._show_plots()
        if self._fit_columns() or dirty is None:
            dirty = fleet.peers.keys()
        if not self._columns:  # not laid out yet
            return
        peers = chosen(
            fleet, now, words=self.words, faults=self.faults, by=self.by, reverse=self.reverse
        )
        self._rows(peers, now)
        for peer in dirty:
            if peer in self._cells:
                self._update(fleet.peers[peer], now)
        self._arrange([peer.peer for peer in peers])
        plots = self.query_one(Plots)
        plots.fleet = fleet
        plots.refresh()
        if peers:
            self.query_one("#nothing").display = False
            self.table.display = True
        else:
            self._say_nothing(self._why_empty(fleet))

    def ages(self, now: float) -> None:
        """Time has passed: look at every row that is shown."""
        if self._fleet is not None:
            for peer in list(self._cells):
                if peer in self._fleet.peers:
                    self._update(self._fleet.peers[peer], now)

    def _fit_columns(self) -> bool:
        """Choose the columns for this width. True if they changed: the table is empty then."""
        # One character for the scroll bar, so that it never covers a column.
        beside = PLOTS_WIDTH if self.query_one("#beside").display else 0
        columns = fit(self.size.width - beside - 1, self.app.size.width)
        if columns == self._columns or not columns:
            return False
        table, self._columns = self.table, columns
        here = self.under_cursor
        table.clear(columns=True)
        for column, width in columns:
            title = Text(column.title, colours().dim, justify="right" if column.right else "left")
            table.add_column(title, width=width, key=column.key)
        self._cells, self._order = {}, []
        self._keep = here
        return True

    def _rows(self, peers: list[Peer], now: float) -> None:
        shown = {peer.peer for peer in peers}
        for gone in [peer for peer in self._cells if peer not in shown]:
            self.table.remove_row(gone)
            del self._cells[gone]
            self._order.remove(gone)
        for peer in peers:
            if peer.peer not in self._cells:
                cells = self._row(peer, now)
                self._cells[peer.peer] = cells
                self.table.add_row(*map(self._paint, cells, self._columns), key=peer.peer)
                self._order.append(peer.peer)

    def _row(self, peer: Peer, now: float) -> list[Cell]:
        cells = []
        for column, width in self._columns:
            cell = column.cell(peer, now, width)
            if column.key == "peer" and peer.peer in self.marked:
                cell = Cell(cut(f"✓ {called(peer)}", width), "strong")
            cells.append(cell)
        return cells

    def _paint(self, cell: Cell, column: tuple[Column, int]) -> Text:
        return painted(cell, right=column[0].right)

    def _update(self, peer: Peer, now: float) -> None:
        old = self._cells[peer.peer]
        new = self._row(peer, now)
        for before, after, column in zip(old, new, self._columns, strict=True):
            if before != after:
                self.table.update_cell(peer.peer, column[0].key, self._paint(after, column))
        self._cells[peer.peer] = new

    def _arrange(self, order: list[str]) -> None:
        """Put the rows in order; the cursor stays on its peer."""
        if order == self._order and self._keep is None:
            return
        here = self._keep or self.under_cursor
        self._keep = None
        if order != self._order:
            place = {peer: index for index, peer in enumerate(order)}
            # The table hands over a row without its key, but always in the order of its rows.
            ranks = iter([place[str(key.value)] for key in self.table.rows])
            self.table.sort(key=lambda row: next(ranks))
            self._order = order
        if here in order and self.follow:
            self.table.move_cursor(row=order.index(here), animate=False)

    def _why_empty(self, fleet: Fleet) -> Text:
        if fleet.peers:
            return Text("No peer fits this view. esc shows all again.", colours().dim)
        text = Text.assemble(("No peers yet.\n\n", f"bold {colours().ink}"))
        text.append("On each machine run:\n", colours().dim)
        text.append("commonweight-agent join TICKET\n\n", colours().blue)
        if not self._read_only:
            text.append("t", f"bold {colours().accent}").append(" makes a ticket", colours().dim)
        return text

    def _say_nothing(self, text: Text) -> None:
        """Words in the place of the table."""
        nothing = self.query_one("#nothing", Static)
        nothing.update(text)
        nothing.display = True
        self.table.display = False

    # --- what a person does ---

    def toggle_mark(self) -> None:
        """Mark the peer under the cursor, or unmark it, and go to the next."""
        if (peer := self.under_cursor) is not None:
            self.marked ^= {peer}
            self.table.action_cursor_down()
            self.post_message(self.Viewed())

    def next_sort(self, step: int) -> None:
        """Sort by the next column."""
        self.by = SORTS[(SORTS.index(self.by) + step) % len(SORTS)]
        self.post_message(self.Viewed())

    def clear(self) -> None:
        """Back to the plain view."""
        self.bar.clear()
        self.marked.clear()
        self.faults, self.follow = False, True
        self.table.focus()
        self.post_message(self.Viewed())

    @on(FilterBar.Changed)
    def _filter_changed(self) -> None:
        self.post_message(self.Viewed())

    @on(FilterBar.Done)
    def _filter_done(self) -> None:
        self.table.focus()

    def _show_plots(self) -> None:
        """The plots stand beside the table where there is room, and a run to plot."""
        run = current_run(self._fleet) if self._fleet else None
        wide = self.app.size.width >= WIDE and not self.zoomed
        self.query_one("#beside").display = wide and run is not None

    def lay_out(self) -> None:
        """Fit everything to the room there is now."""
        self._show_plots()
        self.call_after_refresh(self.post_message, self.Viewed())

    def on_resize(self, event: Resize) -> None:
        self.lay_out()
