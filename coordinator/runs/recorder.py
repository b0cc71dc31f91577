"""What a run writes down and tells: facts for the ledger, and for monitors where it stands."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from coordinator.runs import transitions
from coordinator.runs.context import Fleetwork
from coordinator.runs.messages import run_body
from coordinator.runs.state import Run
from coordinator.runs.timing import Stopwatch
from coordinator.storage import run_events
from coordinator.storage.run_events import Fact
from protocols.errors import TELLABLE, DiskFull
from protocols.failpoints import failpoint
from protocols.messages.envelope import Happened, printable

log = logging.getLogger("commonweight.run")

#: While the disk is full: how often to look, and after how many looks to try all the same.
_LOOK_FOR_ROOM_S = 1.0
_TRIES_WITHOUT_ROOM = 30
_ANNOUNCE_EVERY_S = 0.1


class Chronicle:
    """Of one run; `run` is where it stands after the facts so far.

    `misfits`: peers whose data or model do not fit it. `waiting_for`: what it waits for, for a
    person. `memory_bytes`: what a version takes here.
    """

    def __init__(self, run: Run, around: Fleetwork, watch: Stopwatch) -> None:
        self.run, self._around, self._watch = run, around, watch
        self.misfits: set[str] = set()
        self.waiting_for = ""
        self.memory_bytes = 0
        self._stands_still = False
        self._announced_at = -math.inf
        self._announcing: asyncio.TimerHandle | None = None

    async def record(self, *news: Fact) -> None:
        """Write facts down, and act on none of them before: a full disk holds up the run here."""
        if not news:
            return
        failpoint("run.recording", type(news[0]).__name__)
        for fact in news:
            self._watch.mark(fact)
        bodies = [run_events.encode(fact) for fact in news]
        while True:
            try:
                self._around.ledger.append(self.run.id, bodies)
                break
            except DiskFull as err:
                await self.wait_for_room(err)
        failpoint("run.recorded", type(news[-1]).__name__)
        for fact in news:
            self.run = transitions.apply(self.run, fact)
            if isinstance(fact, run_events.UpdateRefused):
                self._tell_refusal(fact)
        if self._stands_still:
            self._stands_still, self.waiting_for = False, ""
            self.say("info", f"there is room again: run {self.run.id} goes on")
        self.announce()

    def _tell_refusal(self, fact: run_events.UpdateRefused) -> None:
        if fact.reason in TELLABLE:
            self.misfits.add(fact.peer)
        self._around.refused[fact.reason] += 1
        name = self._around.name_of(fact.peer)
        self.say("warning", f"refused {name}: {fact.reason}: {fact.detail}", fact.peer)

    async def wait_for_room(self, err: Exception) -> None:
        """The disk is full: stand still, say so, and come back when there is room."""
        limits = self._around.transfer.limits
        self.waits_for(f"room on the coordinator's disk ({limits.free_bytes / 1e6:,.0f} MB free)")
        if not self._stands_still:
            self._stands_still = True
            self.say("error", f"run {self.run.id} stands still: {err}")
        # Not at once, as little room may be too little; and also without, as a quota shows none.
        for _ in range(_TRIES_WITHOUT_ROOM):
            await asyncio.sleep(_LOOK_FOR_ROOM_S)
            if limits.has_space():
                break

    # --- for the monitors ---

    def waits_for(self, what: str) -> None:
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
        self._around.publish(run_body(self.run, self.waiting_for, self.memory_bytes))

    def say(self, level: Any, text: str, subject: str = "") -> None:
        """An event, of a peer or of the run itself."""
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        subject = subject or self.run.id
        self._around.publish(Happened(level=level, text=printable(text), subject=subject))
