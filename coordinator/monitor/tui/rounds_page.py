"""The Rounds page: what the run does now, its plots, and one row a round, the newest first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Resize
from textual.widgets import Static

from coordinator.fleet.reducer import Fleet, Run, current_run
from coordinator.monitor.peer_table import Cell, Column, fit_columns
from coordinator.monitor.round_table import (
    METRIC_WIDTH,
    ROUND_TITLES,
    WORST_WIDTH,
    accuracy_trend,
    best_round,
    describe_run,
    loss_trend,
    metric_cells,
    metric_names,
    round_cells,
    worst_peer,
)
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.round_plots import RoundPlots
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import trend, truncate

MIN_TALL_TERMINAL = 22


def _nth(number: int, cells: Sequence[Cell], now: float, width: int) -> Cell:
    """What stands in column `number` of a line."""
    return cells[number] if number < len(cells) else Cell("")


class RoundsPage(Vertical):
    """Plots on a tall terminal; on a low one the trends in a line. Zoomed: the plots alone."""

    def __init__(self) -> None:
        super().__init__(id="rounds")
        self.zoomed = False
        #: The cursor stays on the newest round.
        self.follow = True
        self._drawn: tuple[object, ...] = ()
        self._fleet: Fleet | None = None
        self._run = ""
        self._line: tuple[str, list[Cell]] = ("", [])
        self._names: list[str] = []
        self._worst = False
        self._best = 0

    def compose(self) -> ComposeResult:
        yield Static(id="standing")
        yield RoundPlots(id="above")
        yield CellTable(self._cell, id="closed")

    @property
    def table(self) -> CellTable:
        return self.query_one("#closed", CellTable)

    def draw(self, fleet: Fleet | None) -> None:
        """Show the run that matters."""
        run = current_run(fleet) if fleet else None
        plots = self.query_one(RoundPlots)
        plots.display = (
            self.app.size.height >= MIN_TALL_TERMINAL or self.zoomed
        ) and run is not None
        plots.styles.height = "1fr" if self.zoomed else max(2 * self.app.size.height // 5, 9)
        plots.show(fleet)
        self.table.display = run is not None and not self.zoomed
        self.query_one("#standing", Static).update(
            self._run_text(run, lines=not plots.display)
            if run
            else Text("No run yet.  commonweight run start TASK  starts one.", colors().dim)
        )
        if run is not None and fleet is not None:
            self._fill_table(run, fleet)

    def _run_text(self, run: Run, *, lines: bool) -> Text:
        text = Text(describe_run(run), no_wrap=True, overflow="ellipsis")
        if lines and run.rounds:
            width = max((self.size.width - 24) // 2, 8)
            text.append("\nloss ", colors().dim).append(
                trend(loss_trend(run.rounds), width), colors().blue
            )
            text.append("  accuracy ", colors().dim).append(
                trend(accuracy_trend(run.rounds), width), colors().green
            )
        return text

    def _fill_table(self, run: Run, fleet: Fleet) -> None:
        """The table, if its rounds or its room are others than they were."""
        best, last = best_round(run), run.rounds[-1] if run.rounds else None
        drawn = (run.changed.run, len(run.rounds), last, best, self.size.width, self.follow)
        if drawn == self._drawn:
            return
        self._drawn, self._line = drawn, ("", [])
        self._fleet, self._run, self._best = fleet, run.changed.run, best
        self._names = metric_names(run)
        self._worst = any(closed.worst for closed in run.rounds)
        # One character for the scroll bar, so that it never covers a column.
        columns = fit_columns(self._columns(), self.size.width - 1, self.app.size.width)
        self.table.set_rows([str(closed.round) for closed in reversed(run.rounds)], columns)
        if self.follow:
            self.table.move_cursor(0)

    def _columns(self) -> list[Column[list[Cell]]]:
        """What every run has, who was served worst if that is told, and its task's own metrics."""
        titles = [*ROUND_TITLES, *[("Worst", WORST_WIDTH)] * self._worst]
        own = (truncate(name.replace("_", " "), METRIC_WIDTH) for name in self._names)
        titles += [(title, max(len(title), 8)) for title in own]
        return [
            Column(title, title, wide, wide, 0, partial(_nth, number), right=True)
            for number, (title, wide) in enumerate(titles)
        ]

    def _cell(self, number: str, column: Column[list[Cell]], width: int) -> Cell:
        """One of a line's cells: the table asks for them in order, and a line is made once."""
        if self._line[0] != number:
            self._line = (number, self._cells(int(number)))
        return column.cell(self._line[1], 0.0, width)

    def _cells(self, number: int) -> list[Cell]:
        """The line of a round, looked up: no round is kept here that the fleet has let go."""
        run = self._fleet.runs.get(self._run) if self._fleet else None
        rounds = run.rounds if run else []
        at = bisect_left(rounds, number, key=lambda closed: closed.round)
        if self._fleet is None or at == len(rounds) or rounds[at].round != number:
            return []
        cells = round_cells(rounds[at], self._best)
        if self._worst:
            cells.append(Cell(truncate(worst_peer(rounds[at], self._fleet), WORST_WIDTH)))
        return [*cells, *metric_cells(rounds[at], self._names)]

    def invalidate(self) -> None:
        """The next drawing begins anew: the colours are others."""
        self._drawn, self._line = (), ("", [])
        self.table.refresh()

    def on_resize(self, event: Resize) -> None:
        if self.query_one(RoundPlots).fleet is not None:
            self.draw(self.query_one(RoundPlots).fleet)
