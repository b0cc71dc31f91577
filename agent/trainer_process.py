"""The trainer as its parent sees it: starts the child, asks it, pauses it, ends it.

Never imports torch. All methods block and may be called from any thread but that of `on_progress`
(there only `pause`, `resume` and `cancel`). One work runs at a time; a second caller waits.
"""

from __future__ import annotations

import glob
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from agent.tasks import DataSettings, Settings
from agent.trainer import (
    Answer,
    Cancel,
    Done,
    Evaluate,
    Failed,
    Init,
    Pause,
    Progress,
    Request,
    Resume,
    Train,
    Work,
    decode_answer,
    encode,
)
from protocols import failpoints
from protocols.errors import TrainerFailed

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 20
MAX_LOG_BYTES = 1 << 20


def ignore(_: Progress) -> None:
    """Nobody wants to know."""


class TrainerProcess:
    """A trainer that is started when first needed, and again after it died or was stopped.

    `data` is what the next work trains on. `threads` = 0 takes half the cores. A work that shows
    no sign of life for `hang_s` while not paused is ended ("hung"), and one that does not obey a
    cancel within `grace_s` too. `on_progress` runs in the reader's thread and must not block.
    """

    def __init__(
        self,
        work_dir: Path,
        data: DataSettings,
        *,
        threads: int = 0,
        on_progress: Callable[[Progress], None] = ignore,
        hang_s: float = 600.0,
        grace_s: float = 10.0,
    ) -> None:
        self.data = data
        self._work_dir = work_dir
        self._threads = threads or max(1, (os.cpu_count() or 2) // 2)
        self._on_progress = on_progress
        self._hang_s, self._grace_s = hang_s, grace_s
        self._one_at_a_time = threading.Lock()
        self._changed = threading.Condition()
        # All below is guarded by `_changed`.
        self._child: _Child | None = None
        self._id = 0
        self._working = False
        self._answer: Done | Failed | None = None
        self._paused = False
        self._cancel_by: float | None = None
        self._stopping = False
        self._alive_at = self._ended_at = time.monotonic()

    def init(self, task: str, settings: Settings, seed: int, out: Path) -> Done:
        """Write the task's first weights to `out`. Raises TrainerFailed."""
        work = Init(id=0, task=task, settings=dict(settings), seed=seed, out=_full(out))
        return self._do(work, out)

    def train(self, task: str, settings: Settings, base: Path, out: Path) -> Done:
        """Train the weights in `base` and write them to `out`. Raises TrainerFailed.

        `settings` are the task's own, and the run's "seed" and the "round" that order the data.
        """
        work = Train(
            id=0,
            task=task,
            settings=dict(settings),
            data=self._data(),
            base=_full(base),
            out=_full(out),
        )
        return self._do(work, out)

    def evaluate(self, task: str, settings: Settings, base: Path) -> Done:
        """Measure the weights in `base` on the held-out data. Raises TrainerFailed."""
        work = Evaluate(
            id=0, task=task, settings=dict(settings), data=self._data(), base=_full(base)
        )
        return self._do(work)

    def pause(self) -> None:
        """Make the present work stand still after its batch, or the next one after its first."""
        self._set_paused(True)

    def resume(self) -> None:
        """Let the work go on."""
        self._set_paused(False)

    def cancel(self) -> None:
        """Give up the present work, if any: its caller gets TrainerFailed("cancelled")."""
        with self._changed:
            if self._working and self._child and self._cancel_by is None:
                self._cancel_by = time.monotonic() + self._grace_s
                self._child.send(Cancel(self._id))
                self._changed.notify_all()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the child and all it started; a present work fails ("stopped")."""
        with self._changed:
            child = self._child
            if child is None:
                return
            self._stopping = self._working
            child.close()
            if not self._changed.wait_for(lambda: child.exit is not None, timeout_s):
                child.kill()
                self._changed.wait_for(lambda: child.exit is not None, timeout_s)
            if self._child is child:
                self._child = None

    @property
    def running(self) -> bool:
        """True while there is a child."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        child = self._child
        return child.pid if child and child.exit is None else None

    @property
    def idle_s(self) -> float:
        """Seconds since the last work ended; 0 while one is going on or there is no child."""
        with self._changed:
            idle = self.running and not self._working
            return time.monotonic() - self._ended_at if idle else 0.0

    @property
    def rss_bytes(self) -> int:
        """Memory of the child, 0 if there is none."""
        pid = self.pid
        try:
            return int(psutil.Process(pid).memory_info().rss) if pid is not None else 0
        except psutil.Error:  # it ended just now
            return 0

    def _data(self) -> DataSettings:
        if self.data.cache:
            return self.data
        return msgspec.structs.replace(self.data, cache=_full(self._work_dir))

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._alive_at = time.monotonic()
            if self._child:
                self._child.send(Pause() if paused else Resume())
            self._changed.notify_all()

    def _do(self, work: Work, out: Path | None = None) -> Done:
        with self._one_at_a_time:
            with self._changed:
                child = self._started()
                self._id += 1
                self._working, self._answer = True, None
                self._cancel_by, self._stopping = None, False
                self._alive_at = time.monotonic()
                child.send(msgspec.structs.replace(work, id=self._id))
            try:
                answer = self._awaited(child)
            finally:
                with self._changed:
                    self._working = False
                    self._ended_at = time.monotonic()
            if isinstance(answer, Done):
                return answer
            if answer.kind == "out of memory":
                # What the failed work took is given back only by the process's end.
                self.stop()
            if out is not None:
                for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            hint = answer.hint or f"the trainer's log: {self._work_dir / 'trainer.log'}"
            raise TrainerFailed(answer.kind, answer.message, hint)

    def _started(self) -> _Child:
        if self._child is None or self._child.exit is not None:
            try:
                self._child = _Child(self._work_dir, self._threads, self._changed, self._on_answer)
            except OSError as err:
                raise TrainerFailed("start", f"the trainer cannot be started: {err}") from err
            if self._paused:
                self._child.send(Pause())
        return self._child

    def _awaited(self, child: _Child) -> Done | Failed:
        """The answer to the present work, or a Failed that says how the child ended instead."""
        ended_because: Failed | None = None
        with self._changed:
            while self._answer is None:
                if child.exit is not None:
                    return ended_because or self._obituary(child.exit)
                now = time.monotonic()
                by, why = self._limit()
                if ended_because is not None:
                    self._changed.wait()
                elif by is None or now < by:
                    self._changed.wait(None if by is None else by - now)
                else:
                    ended_because = why
                    child.kill()
            return self._answer

    def _limit(self) -> tuple[float | None, Failed]:
        """When the child is to be killed, unless something happens, and why."""
        if self._cancel_by is not None:
            return self._cancel_by, self._failed("cancelled", "the work was cancelled")
        message = f"the trainer gave no sign of life for {self._hang_s:.0f} s and was ended"
        by = None if self._paused else self._alive_at + self._hang_s
        return by, self._failed("hung", message)

    def _obituary(self, code: int) -> Failed:
        if self._stopping:
            return self._failed("stopped", "the trainer was stopped")
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            probably = ", probably out of memory" if name == "SIGKILL" else ""
            return self._failed("killed", f"the trainer was killed{probably} ({name})")
        shown = str(code) if code < 256 else f"{code:#x}"  # Windows tells crashes in hexadecimal
        return self._failed("died", f"the trainer ended with exit code {shown}")

    def _failed(self, kind: str, message: str) -> Failed:
        return Failed(id=self._id, kind=kind, message=message)

    def _on_answer(self, answer: Answer) -> None:
        """Called by the reader's thread for every frame."""
        with self._changed:
            self._alive_at = time.monotonic()
            if isinstance(answer, Done | Failed) and answer.id == self._id:
                self._answer = answer
                self._changed.notify_all()
        if isinstance(answer, Progress):
            try:
                self._on_progress(answer)
            except Exception:
                # A fault in somebody's display must not cost the answers that follow.
                log.exception("on_progress failed")


class _Child:
    """One child process, and the two threads that read its answers and wait for its end."""

    def __init__(
        self,
        work_dir: Path,
        threads: int,
        changed: threading.Condition,
        on_answer: Callable[[Answer], None],
    ) -> None:
        self._changed = changed
        self._on_answer = on_answer
        #: Exit code as Popen gives it; set, and `changed` notified, when all answers were read.
        self.exit: int | None = None
        work_dir.mkdir(parents=True, exist_ok=True)
        log_file = work_dir / "trainer.log"
        too_long = log_file.exists() and log_file.stat().st_size > MAX_LOG_BYTES
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if too_long else 0)
        with os.fdopen(os.open(log_file, flags, 0o600), "ab") as stderr:
            self._process = subprocess.Popen(
                # -P: a file in the present folder must not pass for a module.
                [sys.executable, "-P", "-m", "agent.trainer", "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=work_dir,
                env=_environment(threads),
                # A Ctrl-C in the terminal is for the parent, which then ends the child in order.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, name="trainer answers", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name="trainer end", daemon=True).start()

    def send(self, request: Request) -> None:
        """Write one frame. A child that is gone does not raise here: `exit` tells."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(request) + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        """End its standard input, at which it leaves."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # it left before
            pass

    def kill(self) -> None:
        """End it at once. What it started itself is ended with it, where there are groups."""
        if os.name == "posix":
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # nothing left; macOS says the latter
                pass
        else:
            self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            while line := answers.readline(MAX_FRAME_BYTES):
                try:
                    answer = decode_answer(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    log.error("the trainer wrote a line that is no frame; ending it")
                    self.kill()
                    return
                self._on_answer(answer)

    def _wait(self) -> None:
        code = self._process.wait()
        # Its own children (loaders, say) outlive it otherwise. The group's number is still ours
        # while one of them lives, and free too short a time to have been given out again if not.
        if os.name == "posix":
            self.kill()
        self._reader.join(timeout=5)
        self.close()
        with self._changed:
            self.exit = code
            self._changed.notify_all()


def _environment(threads: int) -> dict[str, str]:
    """The parent's, without our own settings (they may hold secrets)."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("COMMONWEIGHT") or name in (failpoints.VARIABLE, failpoints.TRUTH)
    }
    env |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # run from a source tree
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    return env


def _full(path: Path) -> str:
    return str(path.absolute())  # the child works in another folder
