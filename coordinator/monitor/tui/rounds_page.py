"""The Rounds page: the state of the run, its plots, and one row per round, the newest first."""

from __future__ import annotations

from bisect import bisect_left

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static

from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Fleet, Run
from coordinator.monitor import round_table
from coordinator.monitor.peer_table import Cell, Column, fit_columns
from coordinator.monitor.run_troubles import fit, troubles
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.export import Row, round_rows
from coordinator.monitor.tui.page import Frame, Page
from coordinator.monitor.tui.round_plots import RoundPlots
from coordinator.monitor.tui.theme import colors, styles
from coordinator.remote.formatting import trend, truncate
from protocols.messages.envelope import RoundClosed

#: Plots stand above the table from this height on.
MIN_TALL_TERMINAL = 22
_MIN_TABLE_LINES = 8


class RoundsPage(Page):
    """Plots on a tall terminal, else one line of trends. Zoomed: the plots alone."""

    def __init__(self) -> None:
        super().__init__("rounds")
        self._drawn: tuple[object, ...] = ()
        self._run = ""
        #: The run that is drawn behind the current one, or "".
        self.compared = ""

    def compose(self) -> ComposeResult:
        yield Static(id="run-summary")
        yield RoundPlots(id="round-plots")
        yield CellTable(self._cell, id="round-table")

    @property
    def table(self) -> CellTable:
        return self.query_one("#round-table", CellTable)

    @property
    def copy_text(self) -> str:
        run = current_run(self._fleet) if self._fleet else None
        return run.changed.run if run else ""

    def export_rows(self) -> tuple[str, list[Row]]:
        return "rounds", round_rows(current_run(self._fleet) if self._fleet else None)

    @property
    def view_text(self) -> str:
        return f"compared with {self.compared}: c" if self.compared else ""

    def compare_next(self) -> bool:
        """Compare with the next earlier run, at last with none. False without another run."""
        others = round_table.other_runs(self._fleet) if self._fleet else []
        at = others.index(self.compared) + 1 if self.compared in others else 0
        self.compared = others[at] if at < len(others) else ""
        return bool(others)

    def draw(self, frame: Frame) -> None:
        """Show the current run of `fleet`."""
        fleet = self._fleet = frame.fleet
        run = current_run(fleet) if fleet else None
        plots = self.query_one(RoundPlots)
        height = self.app.size.height
        plots.display = run is not None and (self.zoomed or height >= MIN_TALL_TERMINAL)
        plots.styles.height = "1fr" if self.zoomed else self._plot_lines(run)
        plots.border_title = f"Run {run.changed.run}" if run else ""
        self.table.border_title = f"Rounds {len(run.rounds)}" if run else ""
        if fleet is not None and self.compared not in round_table.other_runs(fleet):
            self.compared = ""
        plots.show(fleet, self.compared, frame.details.evaluations if frame.details else None)
        self.table.display = run is not None and not self.zoomed
        if run is None or fleet is None:
            text = Text("No run yet.  commonweight run start TASK  starts one.", colors().dim)
        else:
            text = self._run_text(run, trends=not plots.display)
            if run.changed.choice:
                choice = truncate(f"model: {run.changed.choice}", self.size.width - 2)
                text.append(f"\n{choice}", colors().dim)
            room = self._trouble_lines
            found = troubles(run, fleet, frame.now, room + 1)
            for line in fit(found, self.size.width - 2, room):
                text.append(f"\n{line.text}", styles()[line.tone])
        self.query_one("#run-summary", Static).update(text)
        if run is not None and fleet is not None:
            self._fill_table(run, fleet)

    def _plot_lines(self, run: Run | None) -> int:
        """The lines of the plots: two fifths, and what a table of all rounds of the run leaves."""
        least = max(2 * self.app.size.height // 5, 9) + self.border
        if run is None or not self.border:
            return least
        table = max(run.changed.rounds, len(run.rounds)) + 1 + self.border
        summary = self.query_one("#run-summary").outer_size.height + 1
        return max(least, self.size.height - summary - max(table, _MIN_TABLE_LINES))

    @property
    def _trouble_lines(self) -> int:
        """How many lines the peers may take that the run refuses or that are paused."""
        return 3 if self.app.size.height < MIN_TALL_TERMINAL else 4 if not self.border else 8

    def _run_text(self, run: Run, *, trends: bool) -> Text:
        text = Text(round_table.describe_run(run), no_wrap=True, overflow="ellipsis")
        if trends and run.rounds:
            width, own = max((self.size.width - 24) // 2, 8), colors()
            text.append("\nloss ", own.dim).append(
                trend(round_table.loss_trend(run.rounds), width), own.blue
            )
            text.append("  accuracy ", own.dim)
            text.append(trend(round_table.accuracy_trend(run.rounds), width), own.green)
        return text

    def _fill_table(self, run: Run, fleet: Fleet) -> None:
        """Fill the table if its rounds or its width have changed."""
        best, last = round_table.best_round(run), run.rounds[-1] if run.rounds else None
        drawn = (run.changed.run, len(run.rounds), last, best, self.size.width, self.follow)
        if drawn == self._drawn:
            return
        self._drawn, self._run = drawn, run.changed.run
        # One character for the scroll bar, so that it never covers a column.
        columns = fit_columns(
            round_table.round_columns(run, fleet),
            self.size.width - 1 - self.border,
            self.app.size.width,
        )
        self.table.set_rows([str(closed.round) for closed in reversed(run.rounds)], columns)
        if self.follow:
            self.table.move_cursor(0)

    def _cell(self, number: str, column: Column[RoundClosed], width: int) -> Cell:
        """A cell of a round, read from the fleet; empty if the fleet no longer has the round."""
        run = self._fleet.runs.get(self._run) if self._fleet else None
        rounds = run.rounds if run else []
        at = bisect_left(rounds, int(number), key=lambda closed: closed.round)
        if at == len(rounds) or rounds[at].round != int(number):
            return Cell("")
        return column.cell(rounds[at], 0.0, width)

    def invalidate(self) -> None:
        self._drawn = ()
        super().invalidate()
