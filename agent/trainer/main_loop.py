"""The main loop of a trainer process: requests in, one work at a time, answers out.

Both trainers use it: `agent.trainer`, which trains here, and `agent.trainer.subfleet`, which lets
another fleet train. `agent.trainer.ipc` defines the frames. When standard input ends, the parent
has exited and the process exits at once; the next trainer resumes from the checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any, NoReturn, Protocol

import msgspec

from agent.policy import sandbox
from agent.tasks import Cancelled
from agent.tasks.training.batch_size import is_out_of_memory
from agent.tasks.work import Done, RunApp, Work
from agent.trainer.ipc import (
    Answer,
    Cancel,
    Failed,
    Pace,
    Pause,
    Ready,
    Resume,
    decode_request,
    encode,
)
from agent.trainer.progress import WorkControl
from protocols.errors import CommonweightError, DiskFull, OutOfMemory
from protocols.local import programs
from protocols.local.disk_space import is_disk_full
from protocols.local.failpoints import failpoint

_PR_SET_PDEATHSIG = 1

Send = Callable[[Answer], None]


class Executor(Protocol):
    """Does one piece of work after another, in the main thread: a Work, or a RunApp."""

    def do(self, work: Any) -> Done | Failed: ...


def run(make_executor: Callable[[WorkControl, Send], Executor]) -> NoReturn:
    """Serve the parent until it exits. `make_executor` gets the control and the progress sender."""
    requests, answers = programs.take_pipes()
    _continue_when_parent_dies()

    def send(answer: Answer) -> None:
        answers.write(encode(answer) + b"\n")
        answers.flush()

    control = WorkControl()
    works: queue.SimpleQueue[Work | RunApp] = queue.SimpleQueue()
    threading.Thread(
        target=_read, args=(requests, control, works), name="requests", daemon=True
    ).start()
    executor = make_executor(control, send)
    send(Ready())
    try:
        while True:
            send(execute(works.get(), executor, control))
    except SystemExit as end:  # raised by a task; a normal exit could wait for the reader thread
        os._exit(end.code if isinstance(end.code, int) else 1)


def execute(work: Work | RunApp, executor: Executor, control: WorkControl) -> Done | Failed:
    """Do the work. An error becomes a Failed."""
    try:
        control.raise_if_cancelled(work.id)
        failpoint("trainer.begun")
        return executor.do(work)
    except Cancelled:
        return Failed(id=work.id, kind="cancelled", message="the work was cancelled")
    except Exception as err:
        if (refused := sandbox.refusal(err)) is not None:
            traceback.print_exc()
            return Failed(id=work.id, kind=sandbox.KIND, message=refused, hint=sandbox.HINT)
        return _failed(work, err)


def _failed(work: Work | RunApp, err: Exception) -> Failed:
    if isinstance(err, CommonweightError):
        return Failed(id=work.id, kind=err.code, message=err.message, hint=err.hint)
    traceback.print_exception(err)
    if isinstance(err, OSError):
        if is_disk_full(err):  # this message leaves the machine, so it must not name the file
            return Failed(id=work.id, kind=DiskFull.code, message="the disk is full", hint=str(err))
        return Failed(id=work.id, kind="file", message=f"a file cannot be used: {err}")
    # A task is foreign code: no error of it may end the main loop.
    if is_out_of_memory(err):  # this message leaves the machine, so it must not quote the task
        return Failed(id=work.id, kind=OutOfMemory.code, message="the task ran out of memory")
    return Failed(id=work.id, kind="task", message=f"{type(err).__name__}: {err}")


def _read(
    requests: IO[bytes], control: WorkControl, works: queue.SimpleQueue[Work | RunApp]
) -> None:
    """The reader thread: applies commands at once and queues work."""
    try:
        for line in requests:
            request = decode_request(line)
            if isinstance(request, Pause | Resume | Pace | Cancel):
                control.apply(request)
            else:
                works.put(request)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        traceback.print_exc()
        os._exit(1)
    # The parent has exited or closed the pipe, so no answer and no clean-up is needed.
    os._exit(0)


def _continue_when_parent_dies() -> None:
    """If the parent dies while we are stopped, Linux sends SIGCONT; we read EOF and exit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
