"""The trainer: the child process that holds the model and the data. `python -m agent.trainer`

It speaks the frames of `agent.trainer.ipc`. A pause or a cancel takes effect between two batches.
When standard input ends, the parent is gone and the trainer leaves at once; what it was doing is in
the journal, and the next trainer goes on with it. The task decides whether torch is imported.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import IO

import msgspec
import psutil

from agent.trainer.executor import Trainer
from agent.trainer.ipc import (
    Answer,
    Cancel,
    Pace,
    Pause,
    Ready,
    Resume,
    Work,
    decode_request,
    encode,
)
from agent.trainer.progress import Control

_PR_SET_PDEATHSIG = 1


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Private copies of the two pipes. Afterwards a task's print goes to the log, and its input()
    finds nothing, so neither can break the protocol."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _read(requests: IO[bytes], control: Control, works: queue.SimpleQueue[Work]) -> None:
    """The reader thread: commands act at once, works wait their turn."""
    try:
        for line in requests:
            request = decode_request(line)
            if isinstance(request, Pause | Resume | Pace | Cancel):
                control.told(request)
            else:
                works.put(request)
    except (msgspec.DecodeError, OSError):
        traceback.print_exc()
        os._exit(1)
    # The parent has gone or wants an end: nobody waits for an answer or for clean-up.
    os._exit(0)


def _offer_to_oom_killer() -> None:
    """Where memory runs out, Linux shall end the trainer and not the agent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        pass  # another system, or a container that forbids it


def _be_nice(nice: int) -> None:
    """Let others go first, on the CPU and on the disk, as far as this system can."""
    if nice == 0:
        return
    process = psutil.Process()
    try:
        if sys.platform == "win32":
            process.nice(psutil.IDLE_PRIORITY_CLASS)
            return
        os.nice(max(0, nice - process.nice()))
        if sys.platform == "linux":
            process.ionice(psutil.IOPRIO_CLASS_IDLE)
            if nice == 19:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (OSError, psutil.Error):
        traceback.print_exc()  # it is still nice


def _thawed_by_parents_death() -> None:
    """A parent that dies while this is frozen wakes it, and it finds its input at an end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def main() -> None:
    requests, answers = _take_pipes()
    parser = argparse.ArgumentParser(prog="python -m agent.trainer", description=__doc__)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    _thawed_by_parents_death()
    _be_nice(options.nice)
    _offer_to_oom_killer()

    def send(answer: Answer) -> None:
        answers.write(encode(answer) + b"\n")
        answers.flush()

    control = Control()
    works: queue.SimpleQueue[Work] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read, args=(requests, control, works), name="requests", daemon=True
    )
    reader.start()
    trainer = Trainer(control, send, options.threads)
    send(Ready())
    try:
        while True:
            trainer.serve(works.get())
    except SystemExit as end:  # a task's own; the usual way out could wait for the reader
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()
