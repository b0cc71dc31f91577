"""python -m benchmarks.faults.month [--rounds 10000] [--out FILE]

Simulates a month in an hour: thousands of rounds of a tiny model on a real fleet. Between runs
machines sleep, the broker restarts, settings change, and logs rotate. Reports how memory and open
files of each program grow with the rounds, with the value after each tenth: a cache that fills
flattens, a leak keeps growing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from agent.home import logs
from benchmarks.faults.site import Site, site
from benchmarks.speed.report import machine
from tests.support.fleet_harness import descendants
from tests.support.waiting import wait_for

NAMES = ("ada", "bob")
_LOOK_EVERY_S = 1.0
#: Memory growth until a process has done everything once does not count.
_SETTLED = 0.3


class Slope(NamedTuple):
    """A least-squares line: growth per 1,000 rounds, its standard error, first and last value."""

    per_1000: float
    error: float
    first: float
    last: float


def slope(samples: list[tuple[int, float]]) -> Slope:
    """The growth of (rounds, value), without the first samples."""
    settled = samples[int(len(samples) * _SETTLED) :]
    count = len(settled)
    mean_x = sum(x for x, _ in settled) / count
    mean_y = sum(y for _, y in settled) / count
    width = sum((x - mean_x) ** 2 for x, _ in settled) or 1.0
    steep = sum((x - mean_x) * (y - mean_y) for x, y in settled) / width
    rest = sum((y - mean_y - steep * (x - mean_x)) ** 2 for x, y in settled)
    error = math.sqrt(rest / max(1, count - 2) / width)
    return Slope(1000 * steep, 1000 * error, settled[0][1], settled[-1][1])


def tenths(samples: list[tuple[int, float]]) -> list[float]:
    """The median value in each tenth of the samples."""
    cuts = [len(samples) * tenth // 10 for tenth in range(11)]
    return [
        round(statistics.median(value for _, value in samples[start:stop]), 1)
        for start, stop in itertools.pairwise(cuts)
        if start < stop
    ]


class Month:
    def __init__(self, fleet: Site) -> None:
        self._fleet = fleet
        self.samples: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        self.rounds = 0
        self.events: defaultdict[str, int] = defaultdict(int)

    def live(self, rounds: int, of: int, on_run: Callable[[], None]) -> None:
        """Runs with this many rounds each, with an event after each run."""
        happenings = (self.sleep, self.new_settings, self.broker_restarts, self.much_is_logged)
        while self.rounds < rounds:
            run = self._fleet.order(
                task="ping", settings={"kilobytes": 4}, rounds=of, quorum=2, seed=self.rounds
            )
            while not self._fleet.ended(run):
                time.sleep(_LOOK_EVERY_S)
                self._look()
            assert self._fleet.ended(run) == "finished", f"{run}: {self._fleet.ended(run)}"
            self.rounds += of
            happening = happenings[self.rounds // of % len(happenings)]
            self.events[happening.__name__] += 1
            happening()
            on_run()

    def _look(self) -> None:
        for name in ("up", *NAMES):
            process = psutil.Process(self._fleet.programs[name].process.pid)
            with suppress(psutil.NoSuchProcess):
                self.samples[f"{name} MB"].append((self.rounds, process.memory_info().rss / 1e6))
                self.samples[f"{name} files"].append((self.rounds, process.num_fds()))

    def sleep(self) -> None:
        """Stop a machine for longer than its connections survive, then wake it."""
        pid = self._fleet.programs["bob"].process.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(15)
        os.kill(pid, signal.SIGCONT)
        self._all_back()

    def new_settings(self) -> None:
        for level in ("debug", "info"):
            assert self._fleet.ask_agent("ada", "policy", "set", "log_level", level).returncode == 0
            time.sleep(1)

    def broker_restarts(self) -> None:
        for child in descendants(self._fleet.programs["up"].process.pid):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._all_back()

    def much_is_logged(self) -> None:
        """Fill the log as in a month, so that it rotates."""
        log = self._fleet.folder / "ada" / logs.FILE
        with log.open("a") as file:
            file.write('{"at":0,"level":"info","name":"x","message":"a month"}\n' * 20_000)
        self.new_settings()

    def _all_back(self) -> None:
        wait_for(
            lambda: all(
                self._fleet.agent(name)["session"] and self._fleet.agent(name)["mqtt"]
                for name in NAMES
            ),
            "all are back",
            120,
        )


def month(rounds: int, of: int, told: Callable[[dict[str, Any]], None]) -> None:
    """Run it; report after each run, so that an interrupted run has results."""
    about, began = machine(), time.monotonic()
    with tempfile.TemporaryDirectory() as place, site(Path(place)) as fleet:
        fleet.rise()
        fleet.enlist(*NAMES)
        life = Month(fleet)

        def tell() -> None:
            kept = sum(file.stat().st_size for file in (fleet.folder / "ada").glob("agent.log*"))
            ledger = (fleet.home / "ledger.db").stat().st_size
            found = {name: slope(values) for name, values in life.samples.items()}
            told(
                {
                    "machine": about,
                    "rounds": life.rounds,
                    "seconds": round(time.monotonic() - began),
                    "events": dict(life.events),
                    "ledger, bytes a round": round(ledger / life.rounds),
                    "log, bytes at most": kept,
                    "growth per 1,000 rounds": {
                        name: {
                            "slope": round(line.per_1000, 3),
                            "error": round(line.error, 3),
                            "first": round(line.first, 1),
                            "last": round(line.last, 1),
                            "by tenths": tenths(life.samples[name]),
                        }
                        for name, line in found.items()
                    },
                }
            )

        life.live(rounds, of, tell)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.month", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--of", type=int, default=250, help="rounds in a run")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    last = ""

    def told(found: dict[str, Any]) -> None:
        nonlocal last
        last = json.dumps(found, indent=1)
        if asked.out:
            asked.out.write_text(last + "\n")

    month(asked.rounds, asked.of, told)
    print(last)


if __name__ == "__main__":
    main()
