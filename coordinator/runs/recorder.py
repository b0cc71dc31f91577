"""Records the events of a run in the ledger and publishes its state to the monitors."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from coordinator.runs import candidates, model_choice, transitions
from coordinator.runs.context import RunContext
from coordinator.runs.messages import run_body
from coordinator.runs.state import Run
from coordinator.runs.timing import PhaseTimer
from coordinator.storage import run_events
from coordinator.storage.ledger import append_beside
from coordinator.storage.run_events import RunEvent
from protocols.errors import AWAITED, UNDECIDED_CODES, DiskFull, StorageUnreachable
from protocols.local.failpoints import failpoint
from protocols.messages import refusals
from protocols.messages.envelope import EventLine, strip_controls

log = logging.getLogger("commonweight.run")

#: While the disk is full: how often to check its space, and how many checks before a retry.
_SPACE_POLL_S = 1.0
_MAX_SPACE_POLLS = 30
_ANNOUNCE_EVERY_S = 0.1
_STORAGE_RETRY_S = 1.0


class RunRecorder:
    """`run` is the state of the run after all events so far.

    `incompatible`: peers that cannot do the work until their owners change something.
    `waiting_for`: text for a person.
    `memory_bytes`: memory that aggregation takes on this machine.
    """

    def __init__(self, run: Run, ctx: RunContext, timer: PhaseTimer) -> None:
        self.run, self._ctx, self._timer = run, ctx, timer
        self.incompatible: set[str] = set()
        self.waiting_for = ""
        self.memory_bytes = 0
        #: What to report when the work continues; empty unless it is interrupted.
        self._interruption = ""
        self._bounded: set[str] = set()
        self._announced_at = -math.inf
        self._announcing: asyncio.TimerHandle | None = None

    async def record(self, *events: RunEvent) -> None:
        """Write events to the ledger, then apply them. Waits while the disk is full, or the
        database of the ledger does not answer.
        """
        if not events:
            return
        failpoint("run.recording", type(events[0]).__name__)
        for event in events:
            self._timer.mark(event)
        bodies = [run_events.encode(event) for event in events]
        while True:
            try:
                await append_beside(self._ctx.ledger, self.run.id, bodies)
                break
            except DiskFull as err:
                await self.wait_for_space(err)
            except StorageUnreachable as err:
                await self.wait_for_storage(err)
        failpoint("run.recorded", type(events[-1]).__name__)
        for event in events:
            self.run = transitions.apply(self.run, event)
            if isinstance(event, run_events.UpdateRefused):
                self._report_refusal(event)
            elif isinstance(event, run_events.UpdateAccepted) and event.update.claimed:
                self._report_bound(event)
            elif isinstance(event, run_events.ScoresMissing):
                name = self._ctx.name_of(event.peer)
                self.report("info", f"{name} compares no models: {event.detail}", event.peer)
            elif isinstance(event, run_events.ModelBegun):
                self.report("info", f"run {self.run.id}: {candidates.text(self.run)}")
            elif isinstance(event, run_events.ModelChosen):
                self.report("info", f"run {self.run.id}: {model_choice.line(event)}")
        if self._interruption:
            self.report("info", f"{self._interruption}: run {self.run.id} continues")
            self._interruption = self.waiting_for = ""
        self.announce()

    def _report_refusal(self, event: run_events.UpdateRefused) -> None:
        refusal = refusals.from_ledger(event.reason, event.detail)
        if refusal.permanent:
            self.incompatible.add(event.peer)
        self._ctx.refused[event.reason] += 1
        name = self._ctx.name_of(event.peer)
        if refusal.kind in UNDECIDED_CODES:
            awaited = AWAITED[refusal.kind]
            self.report("warning", f"{name} awaits {awaited}: {refusal.text}", event.peer)
        else:
            self.report("warning", f"refused {name}: {refusal.text}", event.peer)

    def _report_bound(self, event: run_events.UpdateAccepted) -> None:
        """Report a peer that claims more examples than it declared, once."""
        if event.peer in self._bounded:
            return
        self._bounded.add(event.peer)
        declared, claimed = event.update.num_examples, event.update.claimed
        text = (
            f"{self._ctx.name_of(event.peer)} claims {claimed} examples and counts with the "
            f"{declared} that it declared for this run; a new run counts new data"
        )
        self.report("warning", text, event.peer)

    async def wait_for_space(self, err: Exception) -> None:
        """The disk is full: report it, and return when there is space or it is time for a retry."""
        limits = self._ctx.transfer.limits
        free_mb = limits.free_bytes / 1e6
        self.set_waiting_for(f"space on the coordinator's disk ({free_mb:,.0f} MB free)")
        self._report_interruption(err, "the disk has space again")
        with self._timer.stopped():  # no answer can be recorded, so none is late
            # Not at once, because a little space may not be enough. A quota shows no free space.
            for _ in range(_MAX_SPACE_POLLS):
                await asyncio.sleep(_SPACE_POLL_S)
                if limits.has_space():
                    break

    async def wait_for_storage(self, err: StorageUnreachable) -> None:
        """The database or the store does not answer: report it, and return for a retry."""
        self.set_waiting_for(err.what)
        self._report_interruption(err, f"{err.what} answers again")
        with self._timer.stopped():
            await asyncio.sleep(_STORAGE_RETRY_S)

    def _report_interruption(self, err: Exception, afterwards: str) -> None:
        if not self._interruption:
            self.report("error", f"run {self.run.id} is interrupted: {err}")
        self._interruption = afterwards

    # --- for the monitors ---

    def set_waiting_for(self, what: str) -> None:
        if what != self.waiting_for:
            self.waiting_for = what
            self.announce()

    def announce(self) -> None:
        """Publish the run's state, at most every 0.1 s: now, or in a moment."""
        wait_s = self._announced_at + _ANNOUNCE_EVERY_S - time.monotonic()
        if wait_s <= 0:
            self.announce_now()
        elif self._announcing is None:
            loop = asyncio.get_running_loop()
            self._announcing = loop.call_later(wait_s, self.announce_now)

    def announce_now(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        self._announced_at = time.monotonic()
        self._ctx.publish(run_body(self.run, self.waiting_for, self.memory_bytes))

    def report(self, level: Any, text: str, subject: str = "") -> None:
        """Log and publish an event, about a peer or about the run itself."""
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        subject = subject or self.run.id
        self._ctx.publish(EventLine(level=level, text=strip_controls(text), subject=subject))
