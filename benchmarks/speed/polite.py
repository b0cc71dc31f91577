"""python -m benchmarks.speed.polite [--only pause|busy|impact] [--percent 25]

How fast an agent pauses, and how much it slows down other work. A real agent trains 2NN on MNIST
without end. The machine's /sys is a folder, other programs are busy loops, and the foreground work
compresses bytes on every core.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.report import machine
from tests.support.fleet_harness import Fleet, fleet
from tests.support.laptop import heeding, on_mains
from tests.support.waiting import wait_for

_STILL_S = 0.25
_TIMES = 5
_BYTES = 3_000_000


def _trainer(agent: psutil.Process) -> psutil.Process | None:
    """The agent's trainer; its other children are small programs that read sensors."""
    for child in agent.children():
        try:
            if "agent.trainer" in child.cmdline():
                return child
        except psutil.NoSuchProcess:
            continue
    return None


@contextmanager
def training(
    folder: Path, patience_s: float = 120.0, **settings: str
) -> Iterator[tuple[Fleet, psutil.Process]]:
    """An agent that trains without end, and its trainer process."""
    with fleet(folder, **settings) as site:
        site.up()
        site.join("ada")
        site.start("ada")
        polite = settings["COMMONWEIGHT_AGENT_WORK"] == "auto"
        if polite:  # independent of the load of this machine
            site.ask_agent("ada", "policy", "set", "work", "always", "--for", "5m")
        site.start_run("mnist", "--rounds", "9", "--quorum", "1", "--set", "epochs=100000")
        agent = psutil.Process(site.programs["ada"].process.pid)
        trainer = wait_for(lambda: _trainer(agent), "there is a trainer", patience_s)
        wait_for(
            lambda: trainer.cpu_times().user > 3, "it has loaded torch and its data", patience_s
        )
        if polite:
            site.ask_agent("ada", "policy", "set", "work", "auto", "--for", "1s")
        yield site, trainer


def stands_after_s(trainer: psutil.Process, cause: Callable[[], None]) -> float:
    """Seconds from the cause until the trainer last used the CPU."""
    cause()
    began = moved = time.monotonic()
    used = sum(trainer.cpu_times()[:2])
    while time.monotonic() - moved < _STILL_S + 0.5:
        time.sleep(0.005)
        if (now := sum(trainer.cpu_times()[:2])) != used:
            used, moved = now, time.monotonic()
        assert time.monotonic() - began < 30, "the pause takes too long"
    return moved - began


def pauses() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        on_mains(folder / "sys", True)
        with training(folder, **heeding("battery", sysfs=str(folder / "sys"), nice="0")) as (
            site,
            trainer,
        ):
            times = []
            for _ in range(_TIMES):
                times.append(stands_after_s(trainer, lambda: on_mains(folder / "sys", False)))
                _say(f"stands still after {times[-1]:.2f} s")
                site.until_agent("ada", "is paused", lambda told: told["reason"] == "on battery")
                on_mains(folder / "sys", True)
                site.until_agent("ada", "trains again", lambda told: told["state"] == "training")
                time.sleep(1.0)
            found["mains pulled, s"] = [round(t, 2) for t in times]
    return found


def beside_busy_programs(percent: float) -> dict[str, Any]:
    """`percent`: above the present load of this machine, and below that of the loops."""
    every = os.cpu_count() or 1
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as place,
        training(Path(place), **heeding("busy", nice="0", busy_percent=str(percent))) as (
            site,
            trainer,
        ),
    ):
        for cores in sorted({every // 2, every} - {0}):
            if 100 * cores / every <= percent:
                continue
            times, again = [], []
            for _ in range(_TIMES):
                times.append(_beside_hogs(cores, trainer))
                found["reason"] = site.agent("ada")["reason"]
                _say(f"{cores} busy programs: stands still after {times[-1]:.2f} s")
                ended = time.monotonic()
                site.until_agent("ada", "trains again", lambda told: told["state"] == "training")
                again.append(time.monotonic() - ended)
                time.sleep(2.0)
            found[f"{cores} of {every} cores taken by others, s"] = [round(t, 2) for t in times]
            found["works again after, s, at most"] = round(max(again), 1)
    return found


def _beside_hogs(cores: int, trainer: psutil.Process) -> float:
    """Seconds until the trainer stops beside this many busy loops."""
    hogs: list[subprocess.Popen[bytes]] = []

    def hog() -> None:
        for _ in range(cores):
            hogs.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))

    try:
        return stands_after_s(trainer, hog)
    finally:
        for one in hogs:
            one.kill()
            one.wait()


def compress(seed: int) -> int:
    text = bytes(random.Random(seed).choices(range(97, 123), k=_BYTES))
    return len(lzma.compress(text, preset=5))


def foreground_s() -> float:
    """The time for one compression on each core."""
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(abs, range(cores))  # the interpreters have started
        began = time.monotonic()
        pool.map(compress, range(cores), chunksize=1)
        return time.monotonic() - began


CASES = {
    "defaults": {f"COMMONWEIGHT_AGENT_{k}": v for k, v in {"WORK": "auto", "NICE": "19"}.items()},
    "lowest priority alone (busy always)": heeding(nice="19"),
    "cpu_share 1, no policy, equal priority, every core": {
        "COMMONWEIGHT_AGENT_WORK": "always",
        "COMMONWEIGHT_AGENT_NICE": "0",
        "COMMONWEIGHT_AGENT_THREADS": str(os.cpu_count() or 1),
    },
}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def impact(times: int = 3) -> dict[str, Any]:
    alone = [foreground_s() for _ in range(times)]
    base = statistics.median(alone)
    _say(f"alone: {alone}")
    found: dict[str, Any] = {"alone, s": [round(t, 2) for t in alone]}
    for name, settings in CASES.items():
        _say(name)
        with tempfile.TemporaryDirectory() as place, training(Path(place), **settings):
            beside = [foreground_s() for _ in range(times)]
        _say(f"{beside}")
        slower = 100 * (statistics.median(beside) / base - 1)
        found[name] = {"s": [round(t, 2) for t in beside], "slower, %": round(slower, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.polite", description=__doc__)
    parser.add_argument("--only", choices=["pause", "busy", "impact"], default="")
    parser.add_argument("--percent", type=float, default=25.0, help="what is busy")
    asked = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if asked.only in ("", "impact"):
        results["impact"] = impact()
    if asked.only in ("", "pause"):
        results["pauses"] = pauses()
    if asked.only in ("", "busy"):
        results["beside others"] = beside_busy_programs(asked.percent)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
