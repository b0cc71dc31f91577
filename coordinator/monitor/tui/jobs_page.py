"""The Jobs page: one row per inference or analytics job, and the details of the selected one."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.widgets import Static

from coordinator.fleet.state import Fleet, Job
from coordinator.monitor.job_shares import Shares, share_lines
from coordinator.monitor.job_table import COLUMNS, describe_job, sort_jobs
from coordinator.monitor.peer_table import Cell, Column, fit_columns
from coordinator.monitor.tui.cell_lines import CellLines
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.export import Row, job_rows
from coordinator.monitor.tui.page import Frame, Page
from coordinator.monitor.tui.theme import colors, facts_table

#: Fewer lines for the details of a job, or for the table, are not worth showing.
MIN_FACT_LINES, MIN_TABLE_LINES = 4, 4


class JobsPage(Page):
    """Working jobs stand first. Zoomed: the table alone."""

    def __init__(self) -> None:
        super().__init__("jobs")
        self._shares = Shares()

    def compose(self) -> ComposeResult:
        yield CellTable(self._cell, id="job-table")
        yield Static(id="job-facts")
        yield CellLines(id="job-shares")
        yield Static(id="no-jobs")

    @property
    def table(self) -> CellTable:
        return self.query_one("#job-table", CellTable)

    @property
    def current_job(self) -> Job | None:
        """The job under the cursor."""
        job = self.table.current_id
        return self._fleet.jobs.get(job) if self._fleet and job else None

    @property
    def copy_text(self) -> str:
        return self.table.current_id or ""

    def export_rows(self) -> tuple[str, list[Row]]:
        jobs = self._fleet.jobs if self._fleet else {}
        return "jobs", job_rows([jobs[name] for name in self.table.row_ids if name in jobs])

    def draw(self, frame: Frame) -> None:
        """Show the jobs of `fleet`; the cursor stays with its job."""
        fleet = self._fleet = frame.fleet
        self._now = frame.now
        row_ids = [job.changed.job for job in sort_jobs(fleet)] if fleet else []
        placeholder, pane = self.query_one("#no-jobs", Static), self.query_one("#job-facts", Static)
        table, height = self.table, self.size.height
        table.display, placeholder.display = bool(row_ids), not row_ids
        self.query_one(CellLines).display = bool(row_ids)
        if not row_ids:
            placeholder.update(self._placeholder_text(fleet))
        lines = min(len(row_ids) + 1 + (self.border or 1), height // 2)
        room = height - max(MIN_TABLE_LINES, lines)
        table.border_title = f"Jobs {len(row_ids)}"
        pane.display = bool(row_ids) and not self.zoomed and room >= MIN_FACT_LINES
        table.styles.height = height - room if pane.display else "1fr"
        self._shares = frame.details.shares if frame.details else Shares()
        columns = fit_columns(COLUMNS, self.size.width - 1 - self.border, self.app.size.width)
        if not columns:  # not laid out yet
            return
        current = table.current_id
        table.set_rows(row_ids, columns)
        if current in row_ids:
            table.move_cursor(row_ids.index(current))
        self._show_facts()

    @on(CellTable.RowHighlighted)
    def _show_facts(self) -> None:
        """Show the details of the job under the cursor."""
        if (job := self.current_job) is not None and self._fleet is not None:
            facts = describe_job(job, self._fleet, self._now)
            pane = self.query_one("#job-facts", Static)
            pane.border_title = f"Job {job.changed.job}" if self.border else ""
            pane.update(facts_table(facts))
            self._show_shares(job, self._fleet)

    def _show_shares(self, job: Job, fleet: Fleet) -> None:
        """Show what each peer does in the job, if there is room."""
        pane, lines = self.query_one("#job-facts", Static), self.query_one(CellLines)
        lines.display = pane.display and bool(self.border)
        pane.styles.height = "auto" if lines.display else "1fr"
        if lines.display:
            lines.border_title = f"Peers of job {job.changed.job}"
            lines.show(share_lines(self._shares, job, fleet, *lines.content_size))

    def _cell(self, name: str, column: Column[Any], width: int) -> Cell:
        job = self._fleet.jobs.get(name) if self._fleet else None
        return column.cell(job, self._now, width) if job else Cell("")

    def _placeholder_text(self, fleet: Fleet | None) -> Text:
        own = colors()
        if fleet is None:
            return Text("Waiting for the coordinator…", own.dim)
        text = Text.assemble(("No jobs yet.\n\n", f"bold {own.text}"))
        text.append("Evaluate models on the peers' own rows:\n", own.dim)
        text.append("commonweight infer --private\n\n", own.blue)
        text.append("Distribute your own rows over the peers:\n", own.dim)
        return text.append("commonweight infer --scatter ROWS.csv --out ANSWERS.csv", own.blue)

    def refresh_ages(self, now: float) -> None:
        super().refresh_ages(now)
        self.table.refresh()
        self._show_facts()

    def invalidate(self) -> None:
        super().invalidate()
        self._show_facts()
