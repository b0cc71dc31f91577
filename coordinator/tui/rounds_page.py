"""The Rounds page: what the run does now, its plots, and one row a round, the newest first."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Resize
from textual.widgets import Static

from coordinator.fleet import Fleet, Run, current_run
from coordinator.round_rows import (
    METRIC_WIDE,
    ROUND_TITLES,
    WORST_WIDE,
    accuracy_trend,
    best_round,
    loss_trend,
    metric_cells,
    metric_names,
    round_cells,
    run_words,
    worst_peer,
)
from coordinator.rows import Cell
from coordinator.tui.round_plots import RoundPlots
from coordinator.tui.row_table import RowTable
from coordinator.tui.theme import colours, painted
from coordinator.words import cut, trend

TALL = 22
SHOWN_MOST = 500


class RoundsPage(Vertical):
    """Plots on a tall terminal; on a low one the trends in a line. Zoomed: the plots alone."""

    def __init__(self) -> None:
        super().__init__(id="rounds")
        self.zoomed = False
        #: The cursor stays on the newest round.
        self.follow = True
        self._run: Run | None = None
        self._drawn: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        yield Static(id="standing")
        yield RoundPlots(id="above")
        yield RowTable(id="closed")

    @property
    def table(self) -> RowTable:
        return self.query_one("#closed", RowTable)

    def draw(self, fleet: Fleet | None) -> None:
        """Show the run that matters."""
        run = current_run(fleet) if fleet else None
        plots = self.query_one(RoundPlots)
        plots.display = (self.app.size.height >= TALL or self.zoomed) and run is not None
        plots.styles.height = "1fr" if self.zoomed else max(2 * self.app.size.height // 5, 9)
        plots.show(fleet)
        self.table.display = run is not None and not self.zoomed
        self.query_one("#standing", Static).update(
            self._standing(run, lines=not plots.display)
            if run
            else Text("No run yet.  commonweight run start TASK  starts one.", colours().dim)
        )
        if run is not None and fleet is not None:
            self._fill(run, fleet)

    def _standing(self, run: Run, *, lines: bool) -> Text:
        text = Text(run_words(run), no_wrap=True, overflow="ellipsis")
        if lines and run.rounds:
            width = max((self.size.width - 24) // 2, 8)
            text.append("\nloss ", colours().dim).append(
                trend(loss_trend(run.rounds), width), colours().blue
            )
            text.append("  accuracy ", colours().dim).append(
                trend(accuracy_trend(run.rounds), width), colours().green
            )
        return text

    def _fill(self, run: Run, fleet: Fleet) -> None:
        """A new round adds one row, but it stands on top: the table is small, so it is rebuilt."""
        table, width = self.table, self.size.width
        best = best_round(run)
        last = run.rounds[-1] if run.rounds else None
        drawn = (run.changed.run, len(run.rounds), last, best, width, self.follow)
        if drawn == self._drawn:
            return
        self._drawn = drawn
        cursor = table.cursor_row
        table.clear(columns=True)
        count, room, names = 0, width - 1, metric_names(run)
        titles = [cut(name.replace("_", " "), METRIC_WIDE) for name in names]
        worst = any(closed.worst for closed in run.rounds)
        columns = [*ROUND_TITLES, *[("Worst", WORST_WIDE)] * worst]
        for title, wide in (*columns, *((title, max(len(title), 8)) for title in titles)):
            if room < wide + 2:
                break
            table.add_column(Text(title, colours().dim, justify="right"), width=wide)
            count, room = count + 1, room - wide - 2
        for closed in reversed(run.rounds[-SHOWN_MOST:]):
            cells = round_cells(closed, best)
            cells += [Cell(cut(worst_peer(closed, fleet), WORST_WIDE))] * worst
            cells = [*cells, *metric_cells(closed, names)][:count]
            table.add_row(*(painted(cell, right=True) for cell in cells))
        table.move_cursor(row=0 if self.follow else cursor, animate=False)

    def forget(self) -> None:
        """The next drawing begins anew: the colours are others."""
        self._drawn = ()

    def on_resize(self, event: Resize) -> None:
        if self.query_one(RoundPlots).fleet is not None:
            self.draw(self.query_one(RoundPlots).fleet)
