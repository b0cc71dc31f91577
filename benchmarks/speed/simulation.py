"""Simulated rounds, beside those of Flower's own engine: python -m benchmarks.speed.simulation

Both train the 2NN on the digits, one part a peer, with as many workers as there are cores. More
than 1,000 peers train `tabular`, each on a table of its own.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.speed import report
from benchmarks.speed.processes import cpu_s, family
from coordinator.runs.state import Run

#: Of both.
SETTINGS = {"lr": 0.05, "epochs": 1, "batch_size": 10}
#: The digits have this number of parts. More peers get a table each.
MAX_PARTS, ROWS = 1000, 60
_LOOK_S = 0.5


def ours(
    peers: int,
    per_round: int,
    rounds: int,
    ray: str,
    on_round: Callable[[Run], None] = lambda run: None,
) -> dict[str, Any]:
    """When each round ended, and the start."""
    from commonweight.simulation import simulate
    from coordinator.remote import run_options

    at = list[float]()
    task: dict[str, Any] = {"task": "mnist", "set": SETTINGS}
    with tempfile.TemporaryDirectory(prefix="commonweight-simulation-") as folder:
        owner = {}
        if peers > MAX_PARTS:
            task = {"task": "tabular", "set": {"target": "outcome", "model": "linear"}}
            owner = {"data": write_tables(Path(folder), peers)}
        chosen = run_options.from_keywords({**task, "rounds": rounds})
        began, home = time.time(), Path(folder) / "home"
        made = simulate.create(chosen, peers, per_round=per_round, owner=owner, out=home)

        def ended(run: Run) -> None:
            at.append(time.time())
            on_round(run)

        run = made.run(on_round=ended, ray=ray)
    first = at[0] - run.history[0].seconds
    accuracy = run.history[-1].metrics.get("accuracy")
    digest = run.history[-1].digest
    return {"began": began, "at": [first, *at], "accuracy": accuracy, "digest": digest}


def on_two_nodes(peers: int, per_round: int, rounds: int) -> dict[str, Any]:
    """`ours` on two nodes of Ray on this machine, one core each; one is lost after half of the
    rounds, and the other works on alone."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    first, _ = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def lose_a_node(run: Run) -> None:
        if len(run.history) == rounds // 2:
            cluster.remove_node(first, allow_graceful=False)

    try:
        found = ours(peers, per_round, rounds, cluster.address, lose_a_node)
    finally:
        cluster.shutdown()
    return {**found, "lost_after": rounds // 2}


def write_tables(folder: Path, peers: int) -> str:
    """One table of `ROWS` rows for each peer; returns the owners' setting `data`."""
    draw = np.random.default_rng(1)
    for part in range(peers):
        age, dose = draw.integers(18, 90, ROWS), draw.normal(0, 1, ROWS)
        outcome = (age / 50 + dose > 1.1).astype(int)
        rows = zip(age, dose, outcome, strict=True)
        lines = [f"{years},{amount:.3f},{found}" for years, amount, found in rows]
        (folder / f"{part}.csv").write_text("\n".join(["age,dose,outcome", *lines]) + "\n")
    return f"{folder}/{{part}}.csv"


def memory(root: int) -> int:
    """Bytes of this process and its descendants; shared pages count once."""
    total = 0
    for process in family([root]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.uss)
    return total


def measured(kind: str, words: list[str]) -> dict[str, Any]:
    """One measurement in a process of its own.

    `round_s`: the median, without the first round, and `round_cpu_s` the CPU seconds of all
    processes in one of these rounds. `start_s`: until the first round. `peak_bytes`: memory of all
    processes.
    """
    command = [sys.executable, "-m", "benchmarks.speed.simulation", "--alone", kind, *words]
    looks: list[tuple[float, float, int]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_S):
                looks.append((time.time(), cpu_s([process.pid]), memory(process.pid)))

        looking = threading.Thread(target=look)
        looking.start()
        assert process.stdout is not None
        told = process.stdout.read()
        ended.set()
        looking.join()
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    at = found["at"]
    times, cpu, nbytes = zip(*looks, strict=True)
    used = np.interp(at, times, cpu)
    seconds = np.diff(at)[1:]
    return {
        "round_s": float(np.median(seconds)),
        "round_cpu_s": float(used[-1] - used[1]) / len(seconds),
        "start_s": at[0] - found["began"],
        "start_cpu_s": float(used[0]),
        "peak_bytes": max(nbytes),
        "accuracy": found.get("accuracy"),
        "digest": found.get("digest", ""),
        **_of_loss(seconds.tolist(), found.get("lost_after", 0)),
    }


def _of_loss(seconds: list[float], lost_after: int) -> dict[str, float]:
    """The median round before a node was lost, the round in which it was, and the median after it.

    `seconds`: of each round but the first.
    """
    if not lost_after:
        return {}
    before, (during, *after) = seconds[: lost_after - 1], seconds[lost_after - 1 :]
    return {
        "before_s": statistics.median(before),
        "during_s": during,
        "after_s": statistics.median(after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--ray", action="store_true", help="ours on Ray, too")
    parser.add_argument("--nodes", action="store_true", help="ours on two nodes of Ray, too")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sizes = asked.peers, asked.per_round, asked.rounds
    if asked.alone:
        from benchmarks.speed import stock_simulation

        run = {
            "ours": lambda: ours(*sizes, ""),
            "ours on Ray": lambda: ours(*sizes, "auto"),
            "ours on two nodes": lambda: on_two_nodes(*sizes),
            "stock": lambda: stock_simulation.stock(*sizes),
        }
        print(json.dumps(run[asked.alone]()))
        return
    wanted = {"ours on Ray": asked.ray, "ours on two nodes": asked.nodes, "stock": asked.stock}
    names = ["ours", *(name for name, is_wanted in wanted.items() if is_wanted)]
    words = ["--peers", "--per-round", "--rounds"]
    pairs = [word for pair in zip(words, map(str, sizes), strict=True) for word in pair]
    found = {}
    for name in names:
        found[name] = measured(name, pairs)
        print(name, json.dumps(found[name]), flush=True)
    if asked.keep:
        asked_for = {"peers": asked.peers, "per_round": asked.per_round}
        rows = [{"engine": name} | asked_for | row for name, row in found.items()]
        nodes = [row for row in rows if "during_s" in row]
        others = [row for row in rows if row not in nodes]
        kept = {f"peers_{asked.peers}": others} | ({f"nodes_{asked.peers}": nodes} if nodes else {})
        report.keep("simulation", kept)


if __name__ == "__main__":
    main()
