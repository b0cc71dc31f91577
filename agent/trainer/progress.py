"""Pauses, cancels, slows down and reports work between two batches.

The thread that reads requests applies them to `WorkControl`; the thread that works calls
`StepCallback` after each batch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import SupportsFloat

from agent.tasks import Cancelled
from agent.trainer.ipc import Answer, Cancel, Pace, Pause, Phase, Progress, Resume
from protocols.local.failpoints import failpoint, note

PROGRESS_EVERY_S = 0.2


class WorkControl:
    """The commands of the agent, and the waits that they cause in the working thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._paused = False
        self._pause = 0  # the number of the latest pause
        self._cancelled = -1
        #: The fraction of the time to work; read after every batch without a lock.
        self.work_fraction = 1.0
        #: True while there may be a pause or a cancel; read after every batch without a lock.
        self.needs_attention = False
        self._waited_s = 0.0

    def work_s(self) -> float:
        """Monotonic seconds without those of pauses and of waits for a slower pace."""
        return time.monotonic() - self._waited_s

    def apply(self, request: Pause | Resume | Pace | Cancel) -> None:
        """Apply a command. Called by the reader thread."""
        with self._changed:
            if isinstance(request, Pace):
                self.work_fraction = min(1.0, max(0.01, request.work_fraction))
            elif isinstance(request, Cancel):
                self._cancelled = request.id
            else:
                self._paused = isinstance(request, Pause)
                if isinstance(request, Pause):
                    self._pause = request.number
            self.needs_attention = self._paused or self._cancelled >= 0
            self._changed.notify_all()

    def raise_if_cancelled(self, work: int) -> None:
        """Raise Cancelled if the work was cancelled."""
        if self._cancelled == work:
            raise Cancelled

    def throttle(self, worked_s: float) -> None:
        """Sleep in proportion to the time worked; a command ends the sleep."""
        before = time.monotonic()
        with self._changed:
            share = self.work_fraction
            self._changed.wait_for(
                lambda: self.needs_attention or self.work_fraction != share,
                min(worked_s * (1 / share - 1), 30.0),
            )
        self._waited_s += time.monotonic() - before

    def wait_while_paused(self, work: int, on_pause: Callable[[int], None]) -> bool:
        """Wait while paused; True if there was a pause. Raises Cancelled.

        `on_pause` gets the number of the pause.
        """
        with self._changed:
            self.raise_if_cancelled(work)
            if not self._paused:
                self.needs_attention = False  # a cancel that came too late for the previous work
                return False
            number = self._pause
        on_pause(number)
        before = time.monotonic()
        with self._changed:
            # Checked before each wait: a cancel may have come while `on_pause` ran.
            while self._paused:
                self.raise_if_cancelled(work)
                self._changed.wait()
            self._waited_s += time.monotonic() - before
            self.raise_if_cancelled(work)
        return True


class StepCallback:
    """The `on_step` of one piece of work: sends some Progress a second and obeys the control.

    `keep(step)` writes the checkpoint. It is called when `is_due()`, and before a pause, because
    the machine may be switched off during one.
    """

    def __init__(
        self,
        work: int,
        phase: Phase,
        control: WorkControl,
        send: Callable[[Answer], None],
        is_due: Callable[[], bool] = lambda: False,
        keep: Callable[[int], None] = lambda step: None,
        resumed: bool = False,
    ) -> None:
        self._work, self._phase, self._control, self._send = work, phase, control, send
        self._is_due, self._keep = is_due, keep
        self._sent_at = -math.inf
        self._rested_at = time.monotonic()
        #: Start time and examples of the current rate; None until the first step of resumed work.
        self._window = None if resumed else (time.monotonic(), 0)

    def __call__(self, step: int, steps: int, loss: SupportsFloat, examples_done: int) -> None:
        note("step", phase=self._phase, work=self._work, step=int(step))
        failpoint("trainer.step")
        window = self._window = self._window or (time.monotonic(), examples_done)

        def report(*, paused: bool = False, number: int = 0) -> None:
            # On a graphics card a loss waits for the step. One of a few held-out rows stays here.
            told = float(loss) if self._phase == "train" else math.nan
            self._sent_at = at = time.monotonic()
            since, examples = window
            elapsed = max(at - since, 1e-6)  # clocks may be coarse
            if elapsed >= PROGRESS_EVERY_S / 2:
                self._window = at, examples_done
            self._send(
                Progress(
                    id=self._work,
                    phase=self._phase,
                    step=int(step),
                    steps=int(steps),
                    loss=told,
                    examples_per_s=(examples_done - examples) / elapsed,
                    paused=paused,
                    pause=number,
                )
            )

        def pause(number: int) -> None:
            self._keep(int(step))
            report(paused=True, number=number)

        if step >= steps or time.monotonic() - self._sent_at >= PROGRESS_EVERY_S:
            report()
        if self._is_due():
            self._keep(int(step))
        if self._control.work_fraction < 1.0:
            float(loss)  # so that the time of the step counts
            self._control.throttle(time.monotonic() - self._rested_at)
        if self._control.needs_attention and self._control.wait_while_paused(self._work, pause):
            self._window = time.monotonic(), examples_done  # a pause does not count as working time
        self._rested_at = time.monotonic()
