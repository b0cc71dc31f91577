"""The trainer: the child process that holds the model and the data. `python -m agent.trainer`

`agent.trainer.main_loop` has its main loop. A pause or a cancel takes effect between two batches.
torch is imported only if the task needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

import psutil

from agent.trainer import main_loop
from agent.trainer.executor import WorkExecutor
from agent.trainer.oom_kills import prefer_for_oom_kill


def lower_priority(nice: int) -> None:
    """Lower the CPU and disk priority of this process as far as the system can."""
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
        traceback.print_exc()  # the CPU priority is lower at least


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m agent.trainer", description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    lower_priority(options.nice)
    prefer_for_oom_kill()
    main_loop.run(lambda control, send: WorkExecutor(control, send, options.threads))


if __name__ == "__main__":
    main()
