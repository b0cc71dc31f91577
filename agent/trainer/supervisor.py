"""Supervises the trainer's child process: starts, pauses, watches and stops it.

Never imports torch. All methods block and may be called from any thread but that of `on_progress`
(there only `pause`, `resume` and `cancel`). One piece of work runs at a time; other callers wait.
"""

from __future__ import annotations

import glob
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from agent.tasks.work import Done, Init, Predict, RunApp, Train, Work
from agent.trainer import oom_kills
from agent.trainer.child_process import Program, TrainerChild
from agent.trainer.ipc import Answer, Cancel, Failed, Pace, Pause, Progress, Ready, Resume
from protocols.errors import OutOfMemory, TrainerFailed

log = logging.getLogger(__name__)

#: A batch that runs for longer than this after a pause is stopped in its middle.
FREEZE_AFTER_S = 0.25
#: The time in which a child must obey a cancel, unless a test says another.
GRACE_S = 10.0


class TrainerSupervisor:
    """A child process that is started when needed, also after it died or was stopped.

    `hang_s`, `grace_s` and `on_progress`: as in `TrainerProcess`.
    """

    def __init__(
        self,
        program: Program,
        *,
        on_progress: Callable[[Progress], None],
        hang_s: float,
        grace_s: float = GRACE_S,
    ) -> None:
        self._program = program
        self._stamp: object = None  # of the files that the child's rules are about
        self._on_progress = on_progress
        self._hang_s, self._grace_s = hang_s, grace_s
        self._work_lock = threading.Lock()
        self._changed = threading.Condition()
        # All below is guarded by `_changed`.
        self._child: TrainerChild | None = None
        self._id = 0
        self._working = False
        self._work: Work | RunApp | None = None  # the current or the last one
        self._result: Done | Failed | None = None
        self._paused = self._pause_confirmed = self._ready = False
        self._pause = 0  # the number of the latest pause
        self._share = 1.0
        self._cancel_by: float | None = None
        self._stopping = self._closed = False
        self._oom_kills: int | None = None  # before the child's start
        self._alive_at = self._ended_at = time.monotonic()

    def pause(self) -> None:
        """Pause the current or next work after its batch.

        On Linux, a long batch and a long load of the data are stopped in their middle.
        """
        if self._set_paused(True):
            self._freeze_soon()

    def resume(self) -> None:
        """Continue the work."""
        self._set_paused(False)

    def pace(self, share: float) -> None:
        """Work `share` of the time from now on, 0 < share ≤ 1."""
        with self._changed:
            self._share = share
            if self._child:
                self._child.send(Pace(share))

    def cancel(self, kind: type[Work | RunApp] | None = None) -> None:
        """Cancel the current work, if there is any of this kind (None: any): its caller gets
        TrainerFailed("cancelled")."""
        with self._changed:
            is_meant = kind is None or isinstance(self._work, kind)
            if is_meant and self._working and self._child and self._cancel_by is None:
                self._cancel_by = time.monotonic() + self._grace_s
                self._child.send(Cancel(self._id))
                self._child.thaw()
                self._changed.notify_all()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the child and its children; current work fails ("stopped")."""
        with self._changed:
            child = self._child
            if child is None:
                return
            self._stopping = self._working
            child.close()
            child.thaw()
            if not self._changed.wait_for(lambda: child.exit_code is not None, timeout_s):
                child.kill()
                self._changed.wait_for(lambda: child.exit_code is not None, timeout_s)
            if self._child is child:
                self._child = None

    def close(self) -> None:
        """Stop the child for good: all later work fails ("stopped")."""
        with self._changed:
            self._closed = True
        self.stop()

    @property
    def running(self) -> bool:
        """True while the child runs."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """The process id of the child; None without one."""
        child = self._child
        return child.pid if child and child.exit_code is None else None

    @property
    def idle_s(self) -> float:
        """Seconds since the last work ended; 0 during work or without a child."""
        with self._changed:
            idle = self.running and not self._working
            return time.monotonic() - self._ended_at if idle else 0.0

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the child; 0 without one."""
        pid = self.pid
        try:
            return int(psutil.Process(pid).memory_info().rss) if pid is not None else 0
        except psutil.Error:  # it has just ended
            return 0

    def _set_paused(self, paused: bool) -> bool:
        """False if nothing changes: a second pause must not wake a stopped child."""
        with self._changed:
            if paused == self._paused:
                return False
            self._paused, self._pause_confirmed = paused, False
            self._pause += paused
            self._alive_at = time.monotonic()
            if self._child:
                self._child.send(Pause(self._pause) if paused else Resume())
                self._child.thaw()
            self._changed.notify_all()
            return True

    def _freeze_soon(self) -> None:
        timer = threading.Timer(FREEZE_AFTER_S, self._freeze)
        timer.daemon = True
        timer.start()

    def _freeze(self) -> None:
        """Stop the child if its batch, or its load of the data, has not ended since the pause."""
        with self._changed:
            child = self._child
            if not self._paused or not self._working or self._pause_confirmed or child is None:
                return
            if not self._ready:  # Linux does not yet wake it if we die
                self._freeze_soon()
            elif self._cancel_by is None and not self._stopping:
                child.freeze()

    @property
    def _rules(self) -> SandboxRules | None:
        return self._program.rules

    def do(self, work: Work | RunApp) -> Done:
        """Let the child do the work. Raises TrainerFailed."""
        with self._work_lock:
            if self._rules is not None and self._stamp != self._rules.stamp():
                self.stop()  # a file of the owner was replaced, which the child may not read
            with self._changed:
                child = self._ensure_child()
                self._id += 1
                self._work = work
                self._working, self._pause_confirmed, self._result = True, False, None
                self._cancel_by, self._stopping = None, False
                self._alive_at = time.monotonic()
                child.send(msgspec.structs.replace(work, id=self._id))
                if self._paused:  # the timer of that pause found no work
                    self._freeze_soon()
            try:
                answer = self._wait_for_answer(child)
            finally:
                with self._changed:
                    self._working = False
                    self._ended_at = time.monotonic()
            if isinstance(answer, Done):
                return answer
            if answer.kind == OutOfMemory.code:
                # Only the end of the process frees the memory of the failed work.
                self.stop()
            if isinstance(work, Init | Train | Predict | RunApp):
                out = Path(work.out)
                for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            hint = answer.hint or f"the trainer's log: {self._program.work_dir / 'trainer.log'}"
            raise TrainerFailed(answer.kind, answer.message, hint)

    def _ensure_child(self) -> TrainerChild:
        if self._closed:
            raise TrainerFailed("stopped", "the trainer was stopped")
        if self._child is None or self._child.exit_code is not None:
            self._oom_kills, self._ready = oom_kills.oom_kills(), False
            if self._rules is not None:
                sandbox.check(self._rules)
            try:
                self._child = TrainerChild(self._program, self._changed, self._on_answer)
                self._stamp = self._rules.stamp() if self._rules is not None else None
            except OSError as err:
                raise TrainerFailed("start", f"the trainer cannot be started: {err}") from err
            if self._share != 1.0:
                self._child.send(Pace(self._share))
            if self._paused:
                self._child.send(Pause(self._pause))
        return self._child

    def _wait_for_answer(self, child: TrainerChild) -> Done | Failed:
        """The result of the current work, or a Failed with the reason why the child ended."""
        ended_because: Failed | None = None
        with self._changed:
            while self._result is None:
                if child.exit_code is not None:
                    return ended_because or self._exit_reason(child.exit_code)
                now = time.monotonic()
                by, why = self._deadline()
                if ended_because is not None:
                    self._changed.wait()
                elif by is None or now < by:
                    self._changed.wait(None if by is None else by - now)
                else:
                    ended_because = why
                    child.kill()
            return self._result

    def _deadline(self) -> tuple[float | None, Failed]:
        """When to kill the child, and the reason; None for never."""
        if self._cancel_by is not None:
            return self._cancel_by, self._failed("cancelled", "the work was cancelled")
        message = f"the trainer did not respond for {self._hang_s:.0f} s and was killed"
        by = None if self._paused else self._alive_at + self._hang_s
        return by, self._failed("hung", message)

    def _exit_reason(self, code: int) -> Failed:
        if self._stopping:
            return self._failed("stopped", "the trainer was stopped")
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            if name == "SIGKILL":
                kills = oom_kills.oom_kills()
                if kills is not None and self._oom_kills is not None and kills > self._oom_kills:
                    message = "the system killed the trainer: memory ran out"
                    return self._failed(OutOfMemory.code, message)
                if kills is None:
                    name += ", probably out of memory"
            return self._failed("killed", f"the trainer was killed ({name})")
        shown = (
            str(code) if code < 256 else f"{code:#x}"
        )  # crash codes of Windows are known in hexadecimal
        return self._failed("died", f"the trainer exited with code {shown}")

    def _failed(self, kind: str, message: str) -> Failed:
        return Failed(id=self._id, kind=kind, message=message)

    def _on_answer(self, answer: Answer) -> None:
        """Called by the reader thread for every frame."""
        with self._changed:
            self._alive_at = time.monotonic()
            self._ready |= isinstance(answer, Ready)
            if isinstance(answer, Progress):
                # The confirmation of an earlier pause may arrive after its end.
                self._pause_confirmed = answer.paused and answer.pause == self._pause
            if isinstance(answer, Done | Failed) and answer.id == self._id:
                self._result = answer
                self._changed.notify_all()
        if isinstance(answer, Progress):
            try:
                self._on_progress(answer)
            except Exception:
                # An error in a display must not stop the reader.
                log.exception("on_progress failed")
