"""The Fleet page: one row per peer; plots and recent events where there is room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import tzinfo

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from coordinator.fleet.reducer import current_run, display_name
from coordinator.fleet.state import Event, Fleet, Peer
from coordinator.monitor.peer_table import COLUMNS, SORTS, Cell, Column, fit_columns, select_peers
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.export import Row, peer_rows
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.page import FilterPage, Frame
from coordinator.monitor.tui.recent_events import RecentEvents
from coordinator.monitor.tui.round_plots import RoundPlots
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import truncate

#: Plots stand beside the table from this width on.
MIN_WIDE_TERMINAL = 120
MIN_PLOT_LINES, MAX_PLOT_LINES = 8, 12
MIN_EVENT_LINES, MAX_EVENT_LINES = 3, 14


def plots_width(terminal: int) -> int:
    """The width of the plots beside the table; 0 for no plots."""
    return 0 if terminal < MIN_WIDE_TERMINAL else min(36 + (terminal - MIN_WIDE_TERMINAL) // 5, 60)


class FleetPage(FilterPage):
    """Draws only visible rows: 2,000 reporting peers cost no more than 40."""

    def __init__(self, zone: tzinfo | None = None, *, read_only: bool = False) -> None:
        super().__init__("fleet")
        self.marked: set[str] = set()
        self.sort_by = "state"
        self.reverse = False
        self._read_only, self._zone = read_only, zone

    def compose(self) -> ComposeResult:
        yield FilterBar("name, id, state or label")
        with Horizontal(id="sides"):
            with Vertical(id="left"):
                yield CellTable(self._cell, id="peer-table")
                yield Static(id="no-peers")
                yield RoundPlots(id="bottom-plots", only=3)
                yield RecentEvents(self._zone, id="recent-events")
            yield RoundPlots(id="side-plots", only=4, words=True)

    @property
    def table(self) -> CellTable:
        return self.query_one("#peer-table", CellTable)

    @property
    def current_peer(self) -> str | None:
        """The id of the peer under the cursor."""
        return self.table.current_id

    @property
    def copy_text(self) -> str:
        return self.current_peer or ""

    @property
    def shown(self) -> list[str]:
        """The ids of the peers in the table, in order."""
        return list(self.table.row_ids)

    def export_rows(self) -> tuple[str, list[Row]]:
        peers = self._fleet.peers if self._fleet else {}
        shown = [peers[peer] for peer in self.shown if peer in peers]
        return "peers", peer_rows(shown, self._now)

    @property
    def view_text(self) -> str:
        parts = [f"filter: {self.bar.text}"] if self.bar.text else []
        parts += ["faults only"] if self.faults_only else []
        if self.sort_by != "state" or self.reverse:
            parts.append(f"by {self.sort_by}{' ↑' if self.reverse else ' ↓'}")
        parts += [f"{len(self.marked)} marked"] if self.marked else []
        parts += [] if self.follow else ["in place: f"]
        return " · ".join(parts)

    # --- drawing ---

    def draw(self, frame: Frame) -> None:
        """Show `fleet`; if only some peers changed, plots and events stay as they are."""
        fleet, now = self._fleet, self._now = frame.fleet, frame.now
        if fleet is None:
            self._show_placeholder(self._no_fleet_text())
            return
        self.marked &= fleet.peers.keys()
        beside = self.query_one("#side-plots", RoundPlots)
        has_plots = not self.zoomed and current_run(fleet) is not None
        wide = plots_width(self.app.size.width) if has_plots else 0
        beside.display = wide > 0
        beside.styles.width = wide
        # One character for the scroll bar, so that it never covers a column.
        columns = fit_columns(COLUMNS, self.size.width - wide - 1, self.app.size.width)
        if not columns:  # not laid out yet
            return
        peers = select_peers(
            fleet,
            now,
            query=self.bar.text,
            faults_only=self.faults_only,
            sort_by=self.sort_by,
            reverse=self.reverse,
        )
        table, current = self.table, self.current_peer
        row_ids = [peer.peer for peer in peers]
        table.set_rows(row_ids, columns, self.sort_by, reverse=self.reverse)
        if self.follow and current in row_ids and current != table.current_id:
            table.move_cursor(row_ids.index(current))
        if frame.dirty is None:
            self._lay_out_extras(fleet, len(row_ids), frame.events)
        if peers:
            self.query_one("#no-peers").display = False
            table.display = True
        else:
            self._show_placeholder(self._no_peers_text(fleet))

    def _lay_out_extras(
        self, fleet: Fleet, num_rows: int, events: Callable[[], Sequence[Event]]
    ) -> None:
        """Give the lines that the table does not need to the plots and the recent events."""
        beside = self.query_one("#side-plots", RoundPlots)
        under = self.query_one("#bottom-plots", RoundPlots)
        recent = self.query_one(RecentEvents)
        height = self.query_one("#left").size.height
        free = 0 if self.zoomed or not num_rows else height - (num_rows + 1) - 1
        plot_lines = min(free, MAX_PLOT_LINES) if free >= MIN_PLOT_LINES else 0
        if beside.display or current_run(fleet) is None:
            plot_lines = 0
        event_lines = free - plot_lines - 1 if plot_lines else free
        event_lines = min(event_lines, MAX_EVENT_LINES) if event_lines >= MIN_EVENT_LINES else 0
        for part, lines in ((under, plot_lines), (recent, event_lines)):
            part.display = lines > 0
            part.styles.height = lines
        self.table.styles.height = num_rows + 1 if plot_lines or event_lines else "1fr"
        if event_lines:
            recent.events = events()
            recent.refresh()
        for plot in (beside, under):
            if plot.display:
                plot.show(fleet)

    def refresh_ages(self, now: float) -> None:
        super().refresh_ages(now)
        self.table.refresh()

    def _cell(self, peer_id: str, column: Column[Peer], width: int) -> Cell:
        peer = self._fleet.peers.get(peer_id) if self._fleet else None
        if peer is None:
            return Cell("")
        if column.key == "peer" and peer_id in self.marked:
            return Cell(truncate(f"✓ {display_name(peer)}", width), "strong")
        return column.cell(peer, self._now, width)

    def _no_fleet_text(self) -> Text:
        text = Text("Waiting for the coordinator…", colors().dim)
        if self.error is not None:
            text.append(f"\n\n{self.error.message}", colors().text)
            text.append(f"\n\n{self.error.hint}", colors().blue)
        return text

    def _no_peers_text(self, fleet: Fleet) -> Text:
        if fleet.peers:
            return Text("No peer matches the filter. esc shows all again.", colors().dim)
        text = Text.assemble(("No peers yet.\n\n", f"bold {colors().text}"))
        text.append("On each machine run:\n", colors().dim)
        text.append("commonweight-agent join TICKET\n\n", colors().blue)
        if not self._read_only:
            text.append("t", f"bold {colors().accent}").append(" makes a ticket", colors().dim)
        return text

    def _show_placeholder(self, text: Text) -> None:
        """Show `text` in the place of the table."""
        placeholder = self.query_one("#no-peers", Static)
        placeholder.update(text)
        placeholder.display = True
        for part in ("#peer-table", "#bottom-plots", "#recent-events"):
            self.query_one(part).display = False

    # --- input ---

    def toggle_mark(self) -> None:
        """Mark or unmark the peer under the cursor, and go to the next."""
        if (peer := self.current_peer) is not None:
            self.marked ^= {peer}
            self.table.action_move(1)
            self.redraw()

    @on(CellTable.HeaderSelected)
    def _sort_by_header(self, event: CellTable.HeaderSelected) -> None:
        """Sort by the clicked column; a second click reverses the order."""
        if event.column in SORTS:
            self.reverse = not self.reverse if self.sort_by == event.column else False
            self.sort_by = event.column
            self.redraw()

    def next_sort(self, step: int) -> None:
        """Sort by the next column."""
        self.sort_by = SORTS[(SORTS.index(self.sort_by) + step) % len(SORTS)]
        self.redraw()

    def reset_view(self) -> None:
        self.marked.clear()
        super().reset_view()
