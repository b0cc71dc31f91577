"""The Fleet page: one row per peer; plots and recent events where there is room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import tzinfo

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from coordinator.fleet.readings import current_run, display_name
from coordinator.fleet.state import Event, Fleet, Peer
from coordinator.monitor.fleet_layout import Lines, plots_width, share_compact, share_roomy
from coordinator.monitor.network import TrafficMeter, network_lines
from coordinator.monitor.peer_cards import card_grid
from coordinator.monitor.peer_table import (
    COLUMNS,
    SORTS,
    Cell,
    Column,
    fit_columns,
    fleet_state_cell,
    select_peers,
)
from coordinator.monitor.tui.cell_lines import CellLines
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.export import Row, peer_rows
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.page import FilterPage, Frame
from coordinator.monitor.tui.recent_events import RecentEvents
from coordinator.monitor.tui.round_plots import RoundPlots
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import truncate

_EXTRAS = ("#bottom-plots", "#peer-cards", "#network", "#recent-events")


class FleetPage(FilterPage):
    """Draws only visible rows: 2,000 reporting peers cost no more than 40."""

    def __init__(self, zone: tzinfo | None = None, *, read_only: bool = False) -> None:
        super().__init__("fleet")
        self.marked: set[str] = set()
        self.sort_by = "state"
        self.reverse = False
        self._read_only, self._zone = read_only, zone
        self._meter = TrafficMeter()
        self._lines = Lines()

    def compose(self) -> ComposeResult:
        yield FilterBar("name, id, state or label")
        with Horizontal(id="sides"):
            with Vertical(id="left"):
                yield CellTable(self._cell, id="peer-table")
                yield Static(id="no-peers")
                yield RoundPlots(id="bottom-plots", only=3)
                yield CellLines(id="peer-cards")
                yield CellLines(id="network")
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
        room = self.size.width - wide - 1 - self.border
        columns = fit_columns(COLUMNS, room, self.app.size.width)
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
        left = self.query_one("#left").size
        table_lines = num_rows + 1 + self.border
        free = 0 if self.zoomed or not num_rows else left.height - table_lines
        run = current_run(fleet)
        has_plots = not beside.display and run is not None
        self._lines = lines = (
            share_roomy(free, num_rows, left.width, has_plots=has_plots)
            if self.border
            else share_compact(free, has_plots=has_plots)
        )
        for query, count in zip(_EXTRAS, lines[:4], strict=True):
            part = self.query_one(query)
            part.display = count > 0
            part.styles.height = count
        self.table.styles.height = table_lines if any(lines[:4]) else "1fr"
        of_all = f" of {len(fleet.peers)}" if num_rows < len(fleet.peers) else ""
        self.table.border_title = f"Peers {num_rows}{of_all}"
        for plots in (beside, under):
            plots.border_title = f"Run {run.changed.run}" if run else ""
            if plots.display:
                plots.show(fleet)
        if lines.events:
            recent.events, recent.has_title = events(), not self.border
            recent.refresh()
        self._draw_network()

    def _draw_network(self) -> None:
        """Draw the cards and the network as they are now."""
        fleet, lines = self._fleet, self._lines
        if fleet is None or not (lines.cards or lines.network):
            return
        cards, network = (self.query_one(query, CellLines) for query in ("#peer-cards", "#network"))
        if lines.network:
            self._meter.update(fleet, self._now)
            width = network.content_size.width
            height = lines.network - self.border
            network.border_title = "Network"
            network.show(network_lines(fleet, self._meter, self._now, width, height))
        if lines.grid is not None:
            peers = [fleet.peers[peer] for peer in self.shown if peer in fleet.peers]
            chosen = self.current_peer or ""
            cards.show(card_grid(fleet, peers, self._now, lines.grid, chosen))

    @on(CellTable.RowHighlighted)
    def _choose_card(self) -> None:
        self._draw_network()

    def refresh_ages(self, now: float) -> None:
        super().refresh_ages(now)
        self.table.refresh()
        self._draw_network()

    def _cell(self, peer_id: str, column: Column[Peer], width: int) -> Cell:
        peer = self._fleet.peers.get(peer_id) if self._fleet else None
        if peer is None:
            return Cell("")
        if column.key == "peer" and peer_id in self.marked:
            return Cell(truncate(f"✓ {display_name(peer)}", width), "strong")
        if column.key == "state" and self._fleet is not None:
            return fleet_state_cell(self._fleet, peer, self._now, width)
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
        for part in ("#peer-table", *_EXTRAS):
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
