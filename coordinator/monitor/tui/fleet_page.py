"""The Fleet page: one row a peer; plots and the latest events where there is room to spare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import tzinfo

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.message import Message
from textual.widgets import Static

from coordinator.fleet.reducer import Event, Fleet, Peer, called, current_run
from coordinator.monitor.peer_table import COLUMNS, SORTS, Cell, Column, fit_columns, select_peers
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.recent_events import RecentEvents
from coordinator.monitor.tui.round_plots import RoundPlots
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import truncate
from protocols.errors import CommonweightError

MIN_WIDE_TERMINAL = 120
#: Lines that are worth while: of plots below the table, of the latest events.
MIN_PLOT_LINES, MAX_PLOT_LINES = 8, 12
MIN_EVENT_LINES, MAX_EVENT_LINES = 3, 14


def plots_width(terminal: int) -> int:
    """How broad the plots beside the table are; 0 for none."""
    return 0 if terminal < MIN_WIDE_TERMINAL else min(36 + (terminal - MIN_WIDE_TERMINAL) // 5, 60)


class FleetPage(Vertical):
    """Only rows in sight are drawn: 2,000 peers that all speak cost no more than 40."""

    class ViewChanged(Message):
        """The view was changed: draw it."""

    def __init__(self, zone: tzinfo | None = None, *, read_only: bool = False) -> None:
        super().__init__(id="fleet")
        self.marked: set[str] = set()
        self.faults_only = False
        #: The cursor goes with its peer when the rows move, or stays in its place.
        self.follow = True
        self.sort_by = "state"
        self.reverse = False
        self.zoomed = False
        self._read_only, self._zone = read_only, zone
        self._fleet: Fleet | None = None
        self._now = 0.0
        #: Why there is no fleet yet.
        self.error: CommonweightError | None = None

    def compose(self) -> ComposeResult:
        yield FilterBar("name, id, state or label")
        with Horizontal(id="sides"):
            with Vertical(id="left"):
                yield CellTable(self._cell, id="peers")
                yield Static(id="nothing")
                yield RoundPlots(id="under", only=3)
                yield RecentEvents(self._zone, id="latest")
            yield RoundPlots(id="beside", only=4, words=True)

    def on_mount(self) -> None:
        for part in ("#nothing", "#beside", "#under", "#latest"):
            self.query_one(part).display = False

    @property
    def table(self) -> CellTable:
        return self.query_one("#peers", CellTable)

    @property
    def words(self) -> str:
        """What the filter holds."""
        return self.bar.text

    @property
    def bar(self) -> FilterBar:
        return self.query_one(FilterBar)

    @property
    def current_peer(self) -> str | None:
        """The id of the peer under the cursor."""
        return self.table.current_id

    @property
    def shown(self) -> list[str]:
        """The ids of the peers in the table, in order."""
        return list(self.table.row_ids)

    def invalidate(self) -> None:
        """The next drawing begins anew: the colours are others."""
        self.table.refresh()

    @property
    def view_text(self) -> str:
        """How this view differs from the plain one, in words."""
        parts = [f"filter: {self.words}"] if self.words else []
        parts += ["faults only"] if self.faults_only else []
        if self.sort_by != "state" or self.reverse:
            parts.append(f"by {self.sort_by}{' ↑' if self.reverse else ' ↓'}")
        parts += [f"{len(self.marked)} marked"] if self.marked else []
        parts += [] if self.follow else ["in place: f"]
        return " · ".join(parts)

    # --- drawing ---

    def draw(
        self,
        fleet: Fleet | None,
        now: float,
        dirty: Iterable[str] | None,
        events: Callable[[], Sequence[Event]] = list,
    ) -> None:
        """Show `fleet`; if only `dirty` peers changed, plots and events stay as they are."""
        self._fleet, self._now = fleet, now
        if fleet is None:
            text = Text("Waiting for the coordinator…", colors().dim)
            if self.error is not None:
                text.append(f"\n\n{self.error.message}", colors().text)
                text.append(f"\n\n{self.error.hint}", colors().blue)
            self._show_placeholder(text)
            return
        self.marked &= fleet.peers.keys()
        beside = self.query_one("#beside", RoundPlots)
        wide = 0 if self.zoomed or current_run(fleet) is None else plots_width(self.app.size.width)
        beside.display = wide > 0
        beside.styles.width = wide
        # One character for the scroll bar, so that it never covers a column.
        columns = fit_columns(COLUMNS, self.size.width - wide - 1, self.app.size.width)
        if not columns:  # not laid out yet
            return
        peers = select_peers(
            fleet,
            now,
            query=self.words,
            faults_only=self.faults_only,
            sort_by=self.sort_by,
            reverse=self.reverse,
        )
        table, here = self.table, self.current_peer
        order = [peer.peer for peer in peers]
        table.set_rows(order, columns, self.sort_by, reverse=self.reverse)
        if self.follow and here is not None and here != table.current_id and here in order:
            table.move_cursor(order.index(here))
        if dirty is None:
            self._lay_out_extras(fleet, len(order), events)
        if peers:
            self.query_one("#nothing").display = False
            self.table.display = True
        else:
            self._show_placeholder(self._placeholder_text(fleet))

    def _lay_out_extras(
        self, fleet: Fleet, num_rows: int, events: Callable[[], Sequence[Event]]
    ) -> None:
        """Lines that the table does not need go to the plots and to the latest events."""
        beside, under = self.query_one("#beside", RoundPlots), self.query_one("#under", RoundPlots)
        latest = self.query_one(RecentEvents)
        free = 0 if self.zoomed or not num_rows else self.left_height - (num_rows + 1) - 1
        plots = min(free, MAX_PLOT_LINES) if free >= MIN_PLOT_LINES else 0
        if beside.display or current_run(fleet) is None:
            plots = 0
        told = free - plots - 1 if plots else free
        told = min(told, MAX_EVENT_LINES) if told >= MIN_EVENT_LINES else 0
        for part, lines in ((under, plots), (latest, told)):
            part.display = lines > 0
            part.styles.height = lines
        self.table.styles.height = num_rows + 1 if plots or told else "1fr"
        if told:
            latest.events = events()
            latest.refresh()
        for plot in (beside, under):
            if plot.display:
                plot.show(fleet)

    @property
    def left_height(self) -> int:
        """The lines of the table and what lies under it."""
        return self.query_one("#left").size.height

    def refresh_ages(self, now: float) -> None:
        """Time has passed: draw what is in sight again."""
        self._now = now
        self.table.refresh()

    def _cell(self, peer_id: str, column: Column[Peer], width: int) -> Cell:
        peer = self._fleet.peers.get(peer_id) if self._fleet else None
        if peer is None:
            return Cell("")
        if column.key == "peer" and peer_id in self.marked:
            return Cell(truncate(f"✓ {called(peer)}", width), "strong")
        return column.cell(peer, self._now, width)

    def _placeholder_text(self, fleet: Fleet) -> Text:
        if fleet.peers:
            return Text("No peer fits this view. esc shows all again.", colors().dim)
        text = Text.assemble(("No peers yet.\n\n", f"bold {colors().text}"))
        text.append("On each machine run:\n", colors().dim)
        text.append("commonweight-agent join TICKET\n\n", colors().blue)
        if not self._read_only:
            text.append("t", f"bold {colors().accent}").append(" makes a ticket", colors().dim)
        return text

    def _show_placeholder(self, text: Text) -> None:
        """Words in the place of the table."""
        nothing = self.query_one("#nothing", Static)
        nothing.update(text)
        nothing.display = True
        self.table.display = False
        for part in ("#under", "#latest"):
            self.query_one(part).display = False

    # --- what a person does ---

    def toggle_mark(self) -> None:
        """Mark the peer under the cursor, or unmark it, and go to the next."""
        if (peer := self.current_peer) is not None:
            self.marked ^= {peer}
            self.table.action_move(1)
            self.post_message(self.ViewChanged())

    @on(CellTable.HeaderSelected)
    def _sort_by(self, event: CellTable.HeaderSelected) -> None:
        """A click on a title: by this column, a second time the other way round."""
        if event.column in SORTS:
            self.reverse = not self.reverse if self.sort_by == event.column else False
            self.sort_by = event.column
            self.post_message(self.ViewChanged())

    def next_sort(self, step: int) -> None:
        """Sort by the next column."""
        self.sort_by = SORTS[(SORTS.index(self.sort_by) + step) % len(SORTS)]
        self.post_message(self.ViewChanged())

    def reset_view(self) -> None:
        """Back to the plain view."""
        self.bar.clear()
        self.marked.clear()
        self.faults_only, self.follow = False, True
        self.table.focus()
        self.post_message(self.ViewChanged())

    @on(FilterBar.Changed)
    def _filter_changed(self) -> None:
        self.post_message(self.ViewChanged())

    @on(FilterBar.Submitted)
    def _filter_done(self) -> None:
        self.table.focus()

    def lay_out(self) -> None:
        """Fit everything to the room there is now."""
        self.call_after_refresh(self.post_message, self.ViewChanged())

    def on_resize(self, event: Resize) -> None:
        self.lay_out()
