"""python -m tests.bench.monitor_recording [--out coordinator/recordings/demo.cwrec]

The recording that `commonweight monitor --replay demo` plays: a real coordinator and five agents.
They join, learn the digits, one is paused for a while and one killed and started again, and in the
end each measures the best version on its own digits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.demo_fleet import DemoFleet, Interrupts
from coordinator.facts import RunSpec
from coordinator.fleet import Fleet, current_run, num_available
from coordinator.orders import RunOrder
from coordinator.remote import Remote
from protocols.states import ENDED

AGENTS, ROUNDS = 5, 16
PAUSED, KILLED = "agent3", "agent5"


def record(folder: Path, out: Path) -> None:
    """Live a demo in `folder`, and write what a monitor hears of it."""
    with Interrupts() as interrupts:
        fleet = DemoFleet(folder, interrupts)
        environment = os.environ | {"COMMONWEIGHT_HOME": str(fleet.home)}

        def commonweight(*words: str) -> list[str]:
            return [sys.executable, "-m", "coordinator.cli", *words]

        def until(remote: Remote, holds: Callable[[Fleet], bool]) -> None:
            while not holds(remote.fleet()):
                fleet.check(AGENTS - 1)
                interrupts.wait(0.1)

        try:
            remote = fleet.start_coordinator()
            recorder = subprocess.Popen(
                commonweight("monitor", "--record", str(out)),
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            try:
                fleet.start_agents(remote, AGENTS, "shards", max(1, (os.cpu_count() or 1) // 2))
                until(remote, lambda now: num_available(now, time.time()) == AGENTS)
                spec = RunSpec(task="mnist", rounds=ROUNDS, quorum=AGENTS - 1, deadline_s=120.0)
                remote.start_run(RunOrder(spec=spec))
                until(remote, lambda now: _closed(now) >= ROUNDS // 4)
                subprocess.run(commonweight("peers", "pause", PAUSED), env=environment, check=True)
                until(remote, lambda now: _closed(now) >= ROUNDS // 2)
                subprocess.run(commonweight("peers", "resume", PAUSED), env=environment, check=True)
                killed = fleet._agents[KILLED]
                os.killpg(killed.pid, signal.SIGKILL)
                killed.wait()
                until(remote, lambda now: _closed(now) >= ROUNDS * 5 // 8)
                fleet._agents[KILLED] = fleet._spawn(KILLED, ["agent.cli", "run"])
                until(remote, _is_over)
                until(remote, lambda now: num_available(now, time.time()) == AGENTS)
                words = ("infer", "--private", "mnist", "--model", "best", "--yes")
                subprocess.run(commonweight(*words), env=environment, check=True)
                interrupts.wait(3)
            finally:
                recorder.send_signal(signal.SIGINT)
                recorder.wait(10)
                remote.close()
        finally:
            fleet.stop()


def _closed(fleet: Fleet) -> int:
    run = current_run(fleet)
    return len(run.rounds) if run else 0


def _is_over(fleet: Fleet) -> bool:
    run = current_run(fleet)
    return run is not None and run.changed.state in ENDED


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    options.add_argument("--out", type=Path, default=Path("coordinator/recordings/demo.cwrec"))
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="commonweight-recording-"))
    try:
        record(folder, folder / "demo.cwrec")
        shutil.move(folder / "demo.cwrec", chosen.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
