"""One trainer process: its pipes, the threads that read and wait, and its end."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from agent.trainer.ipc import Answer, Request, decode_answer, encode
from protocols.local import failpoints
from protocols.local.programs import child_environment, forget_secrets, signal_group

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 20
MAX_LOG_BYTES = 1 << 20
_READ_BYTES = 64 * 1024
#: Only Linux wakes a stopped trainer when its parent dies (`main_loop`).
FREEZABLE = sys.platform == "linux"


class Program(NamedTuple):
    """What a trainer's process runs: a module followed by its options, in a folder of its own.

    `rules` are those of the sandbox. `python`: the interpreter; empty for our own.
    """

    work_dir: Path
    arguments: Sequence[str]
    threads: int
    rules: SandboxRules | None = None
    python: str = ""


def half_of_cores() -> int:
    """The threads of a trainer unless the owner says how many."""
    return max(1, (os.cpu_count() or 2) // 2)


class TrainerChild:
    """One child process, and two threads: one reads its answers, one waits for its end."""

    def __init__(
        self, program: Program, changed: threading.Condition, on_answer: Callable[[Answer], None]
    ) -> None:
        work_dir, arguments, threads, rules, python = program
        self._changed = changed
        self._on_answer = on_answer
        #: The exit code of Popen. Set when all answers are read; then `changed` is notified.
        self.exit_code: int | None = None
        work_dir.mkdir(parents=True, exist_ok=True)
        environment = _environment(threads)
        if rules is not None and rules.mode != "off":
            arguments = ["agent.trainer.sandboxed", *arguments]
            if not rules.spool:  # the helper may need them to read the table
                forget_secrets(environment)
            environment |= sandbox.environment(rules, work_dir)
            _make_folders(rules, work_dir)
        self._log = BoundedLog(work_dir / "trainer.log")
        start = partial(
            subprocess.Popen,
            # -P: files in the current folder must not shadow modules.
            [python or sys.executable, "-P", "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=work_dir,
            env=environment,
            # Ctrl-C in the terminal reaches the parent only, which then stops the child.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        started: Future[None] = Future()
        # Linux wakes a stopped child when the thread that started it ends. So the thread that
        # waits for the child's end also starts it.
        threading.Thread(
            target=self._run, args=(start, started), name="trainer end", daemon=True
        ).start()
        started.result()

    def send(self, request: Request) -> None:
        """Write one frame. If the child has ended, this does nothing; see `exit_code`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(request) + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        """Close its standard input, so that it exits."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # it has exited
            pass

    def kill(self) -> None:
        """Kill it. On POSIX systems, also kill the processes that it started."""
        if os.name == "posix":
            signal_group(self.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def freeze(self) -> None:
        """Stop it and the processes that it started with SIGSTOP, if `FREEZABLE`."""
        self._signal("SIGSTOP")

    def thaw(self) -> None:
        """Continue it after `freeze`."""
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        if FREEZABLE and self.exit_code is None:
            signal_group(self.pid, signal.Signals[name])

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            while line := answers.readline(MAX_FRAME_BYTES):
                try:
                    answer = decode_answer(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    log.error("the trainer wrote an invalid frame; killing it")
                    self.kill()
                    return
                self._on_answer(answer)

    def _run(self, start: Callable[[], subprocess.Popen[bytes]], started: Future[None]) -> None:
        """Start the process and wait for its end. An error of `start` goes to `started`."""
        try:
            self._process = start()
        except BaseException as err:
            started.set_exception(err)
            return
        self.pid = self._process.pid
        reader = threading.Thread(target=self._read, name="trainer answers", daemon=True)
        reader.start()
        copier = threading.Thread(
            target=self._log.copy, args=(self._process.stderr,), name="trainer log", daemon=True
        )
        copier.start()
        started.set_result(None)
        code = self._process.wait()
        # Its own children, such as data loaders, would outlive it. The group id is still ours while
        # one of them lives; otherwise it was freed too recently to have been reused.
        if os.name == "posix":
            self.kill()
        reader.join(timeout=5)
        copier.join(timeout=5)
        self.close()
        with self._changed:
            self.exit_code = code
            self._changed.notify_all()


class BoundedLog:
    """The log file of a child. What a child prints without end is read and dropped."""

    def __init__(self, path: Path) -> None:
        too_long = path.exists() and path.stat().st_size > MAX_LOG_BYTES
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if too_long else 0)
        flags |= getattr(os, "O_NOFOLLOW", 0)  # the child can change its folder
        self._file = os.fdopen(os.open(path, flags, 0o600), "ab", buffering=0)

    def copy(self, output: IO[bytes]) -> None:
        """Copy the output until its end, at most twice MAX_LOG_BYTES."""
        left = 2 * MAX_LOG_BYTES
        with self._file as file, output:
            while data := os.read(output.fileno(), _READ_BYTES):
                try:
                    if left > 0:
                        file.write(data[:left])
                        left -= len(data)
                        if left <= 0:
                            file.write(b"\n... further output is dropped\n")
                except OSError:  # a full disk: the child must not wait for its log
                    left = 0


def _make_folders(rules: SandboxRules, work_dir: Path) -> None:
    """The folders that the trainer may write to: it cannot make them itself."""
    shutil.rmtree(work_dir / sandbox.TEMPORARY, ignore_errors=True)
    spool = [rules.spool] if rules.spool else []  # must exist before a rule is made for it
    for folder in (work_dir / sandbox.TEMPORARY, *map(Path, (*rules.write, *spool))):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _environment(threads: int) -> dict[str, str]:
    return child_environment((failpoints.VARIABLE, failpoints.TRUTH)) | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
