"""python -m benchmarks.speed.monitor_recording [--out coordinator/remote/recordings/demo.cwrec]

The recording for `commonweight monitor --replay demo`: a real coordinator and five agents. They
join and train on the digits; one is paused for a while, one is killed and started again; at the end
each evaluates the best version on its own digits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from benchmarks.speed.demo import ROUNDS, Demo, all_there, demo
from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Fleet
from protocols.messages.states import ENDED

PAUSED, KILLED = "agent3", "agent5"


def record(lived: Demo, out: Path) -> None:
    """Run a demo, and record the messages for a monitor."""
    environment = os.environ | {"COMMONWEIGHT_HOME": str(lived.fleet.home)}

    def commonweight(*words: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "coordinator.cli", *words], env=environment, check=True
        )

    recorder = subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "monitor", "--record", str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        lived.join()
        lived.learn()
        lived.until(lambda now: _closed(now) >= ROUNDS // 4)
        commonweight("peers", "pause", PAUSED)
        lived.until(lambda now: _closed(now) >= ROUNDS // 2)
        commonweight("peers", "resume", PAUSED)
        _kill(lived.fleet.agents[KILLED])
        lived.until(lambda now: _closed(now) >= ROUNDS * 5 // 8)
        lived.fleet.start_agent(KILLED)
        lived.until(_is_over)
        lived.until(all_there)
        commonweight("infer", "--private", "mnist", "--model", "best", "--yes")
        lived.wait(3)
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(10)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent and its trainer at once, as a power cut does."""
    family = psutil.Process(agent.pid).children(recursive=True)
    for process in (agent, *family):
        process.kill()
    agent.wait()


def _closed(fleet: Fleet) -> int:
    run = current_run(fleet)
    return len(run.rounds) if run else 0


def _is_over(fleet: Fleet) -> bool:
    run = current_run(fleet)
    return run is not None and run.changed.state in ENDED


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    options.add_argument(
        "--out", type=Path, default=Path("coordinator/remote/recordings/demo.cwrec")
    )
    chosen = options.parse_args()
    with demo() as lived:
        recorded = lived.fleet.folder / "demo.cwrec"
        record(lived, recorded)
        shutil.move(recorded, chosen.out)


if __name__ == "__main__":
    main()
