"""Simulated rounds, beside those of Flower's own engine: python -m benchmarks.speed.simulation

Both train the 2NN on the digits, one part a peer, with as many workers as there are cores.
`--stock` needs Ray (the extra `simulate`) and runs Flower's engine after ours, in the same call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed import report
from benchmarks.speed.processes import family

#: Of both.
SETTINGS = {"lr": 0.05, "epochs": 1, "batch_size": 10}
_LOOK_S = 0.5


def ours(peers: int, per_round: int, rounds: int, ray: str) -> dict[str, Any]:
    """Median seconds of a round and of its training alone, and the start until the first round."""
    import commonweight as cw

    with tempfile.TemporaryDirectory(prefix="commonweight-simulation-") as folder:
        began = time.monotonic()
        run = cw.simulate(
            "mnist" if peers <= 1000 else "ping",
            peers,
            per_round=per_round,
            rounds=rounds,
            ray=ray,
            out=Path(folder) / "home",
            set=SETTINGS if peers <= 1000 else {},
        )
        whole_s, history = time.monotonic() - began, run.history
    seconds = [one.seconds for one in history]
    return {
        "round_s": statistics.median(seconds[1:] or seconds),
        "whole_s": whole_s,
        "start_s": whole_s - sum(seconds),
        "accuracy": history[-1].metrics.get("accuracy"),
    }


def memory(root: int) -> int:
    """Bytes of this process and its descendants; shared pages count once."""
    total = 0
    for process in family([root]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.uss)
    return total


def measured(kind: str, words: list[str]) -> dict[str, Any]:
    """One measurement in a process of its own, with the peak memory of all its processes."""
    command = [sys.executable, "-m", "benchmarks.speed.simulation", "--alone", kind, *words]
    peak = [0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_S):
                peak[0] = max(peak[0], memory(process.pid))

        looking = threading.Thread(target=look)
        looking.start()
        assert process.stdout is not None
        told = process.stdout.read()
        ended.set()
        looking.join()
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return {**found, "peak_bytes": peak[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--ray", action="store_true", help="ours on Ray, too")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sizes = asked.peers, asked.per_round, asked.rounds
    if asked.alone:
        from benchmarks.speed import stock_simulation

        run = {
            "ours": lambda: ours(*sizes, ""),
            "ours on Ray": lambda: ours(*sizes, "auto"),
            "stock": lambda: stock_simulation.stock(*sizes),
        }
        print(json.dumps(run[asked.alone]()))
        return
    names = ["ours", *["ours on Ray"] * asked.ray, *["stock"] * asked.stock]
    words = ["--peers", "--per-round", "--rounds"]
    pairs = [word for pair in zip(words, map(str, sizes), strict=True) for word in pair]
    found = {}
    for name in names:
        found[name] = measured(name, pairs)
        print(name, json.dumps(found[name]), flush=True)
    if asked.keep:
        report.keep("simulation", {f"{asked.peers} peers": {"per_round": asked.per_round, **found}})


if __name__ == "__main__":
    main()
