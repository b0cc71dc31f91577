"""What holds work back between two batches: a pause, a cancel, a pace; and what it tells meanwhile.

`Control` is told by the thread that reads requests, `Meter` obeys in the one that works.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from agent.tasks import Cancelled
from agent.trainer.ipc import Answer, Cancel, Pace, Pause, Phase, Progress, Resume
from protocols.failpoints import failpoint, note

PROGRESS_EVERY_S = 0.2


class WorkControl:
    """What the reader thread was told, and the gate at which the working thread obeys."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._paused = False
        self._pause = 0  # the number of the latest pause
        self._cancelled = -1
        #: The part of the time in which to work; read after every batch without a lock.
        self.work_fraction = 1.0
        #: Read after every batch without a lock; true while there may be something to obey.
        self.needs_attention = False

    def apply(self, request: Pause | Resume | Pace | Cancel) -> None:
        """Note a command. Called by the reader thread."""
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
        """Raise Cancelled if the work is not wanted any more."""
        if self._cancelled == work:
            raise Cancelled

    def throttle(self, worked_s: float) -> None:
        """Rest after so much work, as the pace wants it; a command ends the rest."""
        with self._changed:
            share = self.work_fraction
            self._changed.wait_for(
                lambda: self.needs_attention or self.work_fraction != share,
                min(worked_s * (1 / share - 1), 30.0),
            )

    def wait_while_paused(self, work: int, on_pause: Callable[[int], None]) -> bool:
        """Raise Cancelled, or stand still while paused; True if there was a pause.

        `on_pause` is given the number of the pause.
        """
        with self._changed:
            self.raise_if_cancelled(work)
            if not self._paused:
                self.needs_attention = False  # a cancel that came too late for the work before
                return False
            number = self._pause
        on_pause(number)
        with self._changed:
            # Checked before each wait: a cancel may have come while `on_pause` ran.
            while self._paused:
                self.raise_if_cancelled(work)
                self._changed.wait()
            self.raise_if_cancelled(work)
        return True


class StepCallback:
    """The `on_step` of one work: sends a few Progress a second and obeys the control.

    `keep(step)` writes the journal; it is called when `is_due()`, and before a pause, which may
    well end with the machine switched off.
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
        #: When the present rate's measure began, and the examples at that time; None until the
        #: first step of work that was gone on with.
        self._window = None if resumed else (time.monotonic(), 0)

    def __call__(self, step: int, steps: int, loss: float, examples_done: int) -> None:
        note("step", phase=self._phase, work=self._work, step=int(step))
        failpoint("trainer.step")
        window = self._window = self._window or (time.monotonic(), examples_done)

        def report(*, paused: bool = False, number: int = 0) -> None:
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
                    loss=float(loss),
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
            self._control.throttle(time.monotonic() - self._rested_at)
        if self._control.needs_attention and self._control.wait_while_paused(self._work, pause):
            self._window = time.monotonic(), examples_done  # a pause is no time at work
        self._rested_at = time.monotonic()
