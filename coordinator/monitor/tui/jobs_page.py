"""The Jobs page: what the fleet is asked beside training, a row a job, and the chosen one whole."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Resize
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Static

from coordinator.fleet.reducer import Fleet, Job
from coordinator.monitor.job_table import COLUMNS, describe_job, sort_jobs
from coordinator.monitor.peer_table import Cell, Column, fit_columns
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.theme import colors, to_text

#: Lines that are worth while: of the chosen job, of the table.
MIN_FACT_LINES, MIN_TABLE_LINES = 4, 4


class JobFacts(Widget):
    """All that is known of one job."""

    DEFAULT_CSS = "JobFacts { height: 1fr; padding: 0 1; border-top: solid $panel-lighten-2; }"

    facts: reactive[tuple[tuple[str, Cell], ...]] = reactive(())
    """(what, words) by line."""

    def render(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style=colors().dim, no_wrap=True)
        table.add_column(style=colors().text)
        for what, cell in self.facts:
            words = to_text(cell)
            words.no_wrap = False
            table.add_row(what, words)
        return table


class JobsPage(Vertical):
    """What is under way stands first. Zoomed: the table alone."""

    def __init__(self) -> None:
        super().__init__(id="jobs")
        self.zoomed = False
        self._fleet: Fleet | None = None
        self._now = 0.0

    def compose(self) -> ComposeResult:
        yield CellTable(self._cell, id="asked")
        yield JobFacts(id="job")
        yield Static(id="no-jobs")

    @property
    def table(self) -> CellTable:
        return self.query_one("#asked", CellTable)

    @property
    def current_job(self) -> Job | None:
        """The job under the cursor."""
        here = self.table.current_id
        return self._fleet.jobs.get(here) if self._fleet and here else None

    @property
    def shown(self) -> list[Job]:
        """The jobs in the table, in order."""
        jobs = self._fleet.jobs if self._fleet else {}
        return [jobs[name] for name in self.table.row_ids if name in jobs]

    def draw(self, fleet: Fleet | None, now: float) -> None:
        """Show the jobs of `fleet`; the cursor stays with its job."""
        self._fleet, self._now = fleet, now
        order = [job.changed.job for job in sort_jobs(fleet)] if fleet else []
        nothing, pane = self.query_one("#no-jobs", Static), self.query_one(JobFacts)
        self.table.display, nothing.display = bool(order), not order
        room = self.size.height - max(MIN_TABLE_LINES, min(len(order) + 2, self.size.height // 2))
        pane.display = bool(order) and not self.zoomed and room >= MIN_FACT_LINES
        self.table.styles.height = self.size.height - room if pane.display else "1fr"
        if not order:
            nothing.update(self._placeholder_text(fleet))
        columns = fit_columns(COLUMNS, self.size.width - 1, self.app.size.width)
        if not columns:  # not laid out yet
            return
        table, here = self.table, self.table.current_id
        table.set_rows(order, columns)
        if here in order:
            table.move_cursor(order.index(here))
        self._show_facts()

    @on(CellTable.RowHighlighted)
    def _show_facts(self) -> None:
        """Tell all of the job under the cursor."""
        if (job := self.current_job) is not None and self._fleet is not None:
            self.query_one(JobFacts).facts = tuple(describe_job(job, self._fleet, self._now))

    def _cell(self, name: str, column: Column[Any], width: int) -> Cell:
        job = self._fleet.jobs.get(name) if self._fleet else None
        return column.cell(job, self._now, width) if job else Cell("")

    def _placeholder_text(self, fleet: Fleet | None) -> Text:
        own = colors()
        if fleet is None:
            return Text("Waiting for the coordinator…", own.dim)
        text = Text.assemble(("No jobs yet.\n\n", f"bold {own.text}"))
        text.append("Measure shared models where the data lie:\n", own.dim)
        text.append("commonweight infer --private\n\n", own.blue)
        text.append("Spread rows of your own over the peers:\n", own.dim)
        return text.append("commonweight infer --scatter ROWS.csv --out ANSWERS.csv", own.blue)

    def refresh_ages(self, now: float) -> None:
        """Time has passed."""
        self._now = now
        self.table.refresh()
        self._show_facts()

    def invalidate(self) -> None:
        """The next drawing begins anew: the colours are others."""
        self.table.refresh()
        self.query_one(JobFacts).refresh()

    def on_resize(self, event: Resize) -> None:
        self.call_after_refresh(self._redraw)

    def _redraw(self) -> None:
        """Fit everything to the room there is now."""
        self.draw(self._fleet, self._now)
