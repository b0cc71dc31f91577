"""A real fleet with random faults for minutes: nothing may be lost, and memory must not grow."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults import checker
from benchmarks.faults.results import Row
from benchmarks.faults.site import TRAINING, Site, site
from tests.support.fault_proxy import BLACKHOLE, CLEAR, Fault, Proxy
from tests.support.fleet_harness import descendants
from tests.support.waiting import wait_for

NAMES = ("ada", "bob", "cyd")
#: These are never killed, so that their memory can be measured.
STEADY = ("bob", "cyd")
_SAMPLE_EVERY_S = 5.0
#: Memory growth until a process has done everything once does not count.
_SETTLED_AFTER_S = 90.0
_MB = 1 << 20


class Memory:
    """Resident bytes of processes over time; `slope` of a least-squares line, in MB per hour.

    The coordinator keeps a few KB per closed round: `rounds` is the number of these,
    to separate growth with work from growth with time.
    """

    def __init__(self) -> None:
        self._samples: defaultdict[str, list[tuple[float, float, int]]] = defaultdict(list)

    def look(self, name: str, pid: int, rounds: int) -> None:
        with suppress(psutil.NoSuchProcess):
            rss = psutil.Process(pid).memory_info().rss
            self._samples[f"{name} {pid}"].append((time.monotonic(), rss / _MB, rounds))

    def slope(self, name: str) -> tuple[float, float, int] | None:
        """MB per hour, seconds and rounds of this program's longest life; None if too short."""
        lives = [samples for key, samples in self._samples.items() if key.split()[0] == name]
        life = max(lives, key=len, default=[])
        settled = [sample for sample in life if sample[0] > life[0][0] + _SETTLED_AFTER_S]
        if len(settled) < 10:
            return None
        mean_t = sum(t for t, _, _ in settled) / len(settled)
        mean_y = sum(y for _, y, _ in settled) / len(settled)
        over = sum((t - mean_t) * (y - mean_y) for t, y, _ in settled)
        slope = over / sum((t - mean_t) ** 2 for t, _, _ in settled)
        first, last = settled[0], settled[-1]
        return slope * 3600, last[0] - first[0], last[2] - first[2]


class Soak:
    """A fleet with random faults from `seed`."""

    def __init__(self, fleet: Site, proxies: dict[str, Proxy], seed: int) -> None:
        self._fleet, self._proxies = fleet, proxies
        self._random = random.Random(seed)
        self.memory = Memory()
        self.faults: defaultdict[str, int] = defaultdict(int)
        self._run = ""
        self.runs = 0

    def go_on(self, minutes: float) -> None:
        """Inject faults until the time is up; the coordinator dies only in the first third."""
        began = time.monotonic()
        ends, next_fault, sampled = began + minutes * 60, began + 5, 0.0
        while (now := time.monotonic()) < ends:
            self._keep_a_run()
            if now >= sampled + _SAMPLE_EVERY_S:
                sampled = now
                rounds = checker.count(self._fleet.home, "RoundClosed")
                self.memory.look("coordinator", self._fleet.programs["up"].process.pid, rounds)
                for name in STEADY:
                    self.memory.look(name, self._fleet.programs[name].process.pid, rounds)
            if now >= next_fault:
                self._fault(early=now < began + minutes * 20)
                next_fault = time.monotonic() + self._random.uniform(3, 12)
            time.sleep(0.3)
        for proxy in self._proxies.values():
            proxy.fault = CLEAR

    def _keep_a_run(self) -> None:
        if not self._run or self._fleet.ended(self._run):
            trains = self._random.random() < 0.5
            self._run = self._fleet.order(
                task="mnist" if trains else "ping",
                settings=TRAINING if trains else {"kilobytes": 64},
                deadline_s=6.0,
                seed=self._random.randrange(1000),
                rounds=self._random.randint(5, 60),
                quorum=2,
            )
            self.runs += 1

    def _fault(self, *, early: bool) -> None:
        faults: list[Callable[[], None]] = [
            self.agent_dies,
            self.trainer_dies,
            self.broker_dies,
            self.agent_stands_still,
            self.link_breaks,
            self.link_hangs,
            self.link_crawls,
        ]
        if early:
            faults += [self.coordinator_dies, self.coordinator_dies]
        fault = self._random.choice(faults)
        self.faults[fault.__name__] += 1
        fault()

    def coordinator_dies(self) -> None:
        self._fleet.programs["up"].kill()
        self._fleet.rise()

    def agent_dies(self) -> None:
        self._fleet.programs["ada"].kill()
        self._fleet.come_back("ada")

    def trainer_dies(self) -> None:
        name = self._random.choice(NAMES)
        for child in descendants(self._fleet.programs[name].process.pid):
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def broker_dies(self) -> None:
        for child in descendants(self._fleet.programs["up"].process.pid):
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def agent_stands_still(self) -> None:
        pid = self._fleet.programs[self._random.choice(NAMES)].process.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(1, 8))
        os.kill(pid, signal.SIGCONT)

    def link_breaks(self) -> None:
        self._random.choice(list(self._proxies.values())).reset()

    def link_hangs(self) -> None:
        self._for_a_while(BLACKHOLE)

    def link_crawls(self) -> None:
        self._for_a_while(Fault(delay_s=0.1, jitter_s=0.1, bytes_per_s=60_000, drop=0.01))

    def _for_a_while(self, fault: Fault) -> None:
        proxy = self._random.choice(list(self._proxies.values()))
        proxy.fault = fault
        time.sleep(self._random.uniform(1, 8))
        proxy.fault = CLEAR


def soak(folder: Path, minutes: float, seed: int) -> Row:
    """Mixed faults for a time; then the last run must end without faults."""
    row = Row("37 mixed soak, random faults", f"{minutes:g} minutes")
    with site(folder) as fleet:
        fleet.rise()
        fleet.join(*NAMES)
        proxies = {name: Proxy(fleet.port, seed=seed) for name in NAMES}
        for name, proxy in proxies.items():
            proxy.__enter__()
            fleet.redirect(name, proxy.port)
        try:
            fleet.start(*NAMES)
            chaos = Soak(fleet, proxies, seed)
            chaos.go_on(minutes)
            fleet.note_family()
            wait_for(lambda: all(fleet.agent(name)["session"] for name in NAMES), "all are back")
            every = sorted(checker.run_names(fleet.home))
            for run in every:
                fleet.outcome(run, within_s=300)
            found = fleet.violations(NAMES)
            found += [f"{r} {fleet.ended(r)}" for r in every if fleet.ended(r) != "finished"]
            row.add(f"{sum(chaos.faults.values())} faults in {chaos.runs} runs", seed, found)
            row.cases = sum(chaos.faults.values())
            told = []
            for name in ("coordinator", *STEADY):
                if slope := chaos.memory.slope(name):
                    told.append(
                        f"{name} {slope[0]:+.1f} MB an hour over {slope[1]:.0f} s"
                        f" and {slope[2]:,} rounds"
                    )
            row.figure = f"{chaos.runs} runs; " + ("; ".join(told) or "too short for a slope")
            print(f"  {dict(chaos.faults)}", flush=True)
        finally:
            for proxy in proxies.values():
                proxy.__exit__(None, None, None)
    return row
