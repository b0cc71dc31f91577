"""What a run writes down and tells: events for the ledger, and for monitors where it stands."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from coordinator.runs import transitions
from coordinator.runs.context import RunContext
from coordinator.runs.messages import run_body
from coordinator.runs.state import Run
from coordinator.runs.timing import PhaseTimer
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from protocols.errors import SHAREABLE_CODES, DiskFull
from protocols.failpoints import failpoint
from protocols.messages.envelope import EventLine, strip_controls

log = logging.getLogger("commonweight.run")

#: While the disk is full: how often to look, and after how many looks to try all the same.
_SPACE_POLL_S = 1.0
_MAX_SPACE_POLLS = 30
_ANNOUNCE_EVERY_S = 0.1


class RunRecorder:
    """Of one run; `run` is where it stands after the events so far.

    `misfits`: peers whose data or model do not fit it. `waiting_for`: what it waits for, for a
    person. `memory_bytes`: what a version takes here.
    """

    def __init__(self, run: Run, ctx: RunContext, watch: PhaseTimer) -> None:
        self.run, self._ctx, self._watch = run, ctx, watch
        self.incompatible: set[str] = set()
        self.waiting_for = ""
        self.memory_bytes = 0
        self._disk_full = False
        self._announced_at = -math.inf
        self._announcing: asyncio.TimerHandle | None = None

    async def record(self, *news: RunEvent) -> None:
        """Write events down, and act on none of them before: a full disk holds up the run here."""
        if not news:
            return
        failpoint("run.recording", type(news[0]).__name__)
        for event in news:
            self._watch.mark(event)
        bodies = [run_events.encode(event) for event in news]
        while True:
            try:
                self._ctx.ledger.append(self.run.id, bodies)
                break
            except DiskFull as err:
                await self.wait_for_space(err)
        failpoint("run.recorded", type(news[-1]).__name__)
        for event in news:
            self.run = transitions.apply(self.run, event)
            if isinstance(event, run_events.UpdateRefused):
                self._report_refusal(event)
        if self._disk_full:
            self._disk_full, self.waiting_for = False, ""
            self.report("info", f"there is room again: run {self.run.id} goes on")
        self.announce()

    def _report_refusal(self, event: run_events.UpdateRefused) -> None:
        if event.reason in SHAREABLE_CODES:
            self.incompatible.add(event.peer)
        self._ctx.refused[event.reason] += 1
        name = self._ctx.name_of(event.peer)
        self.report("warning", f"refused {name}: {event.reason}: {event.detail}", event.peer)

    async def wait_for_space(self, err: Exception) -> None:
        """The disk is full: stand still, say so, and come back when there is room."""
        limits = self._ctx.transfer.limits
        self.set_waiting_for(
            f"room on the coordinator's disk ({limits.free_bytes / 1e6:,.0f} MB free)"
        )
        if not self._disk_full:
            self._disk_full = True
            self.report("error", f"run {self.run.id} stands still: {err}")
        # Not at once, as little room may be too little; and also without, as a quota shows none.
        for _ in range(_MAX_SPACE_POLLS):
            await asyncio.sleep(_SPACE_POLL_S)
            if limits.has_space():
                break

    # --- for the monitors ---

    def set_waiting_for(self, what: str) -> None:
        """Tell it, if it is news."""
        if what != self.waiting_for:
            self.waiting_for = what
            self.announce()

    def announce(self) -> None:
        """Tell where the run stands; of what changes faster than monitors care for, the last."""
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
        """An event, of a peer or of the run itself."""
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        subject = subject or self.run.id
        self._ctx.publish(EventLine(level=level, text=strip_controls(text), subject=subject))
