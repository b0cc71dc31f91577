"""Simulated rounds, beside those of Flower's own engine: python -m benchmarks.speed.simulation

Both train the 2NN on the digits, one part a peer, with as many workers as there are cores.
`--stock` needs Ray (the extra `simulate`) and runs Flower's engine after ours, in the same call.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed import report
from benchmarks.speed.processes import family

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


def stock(peers: int, per_round: int, rounds: int) -> dict[str, Any]:
    """The same in Flower's engine on Ray."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    cache = tempfile.mkdtemp(prefix="commonweight-stock-")
    client, server = ClientApp(), ServerApp()

    @functools.lru_cache(32)
    def task_of(index: int) -> Any:
        import torch

        from agent.data.settings import DataSettings
        from agent.tasks.demo.mnist import Mnist

        torch.set_num_threads(1)
        made = Mnist()
        made.load(DataSettings(index=index, parts=peers, cache=cache))
        return made

    def weights_of(message: Message) -> Any:
        from protocols.model.weights import Weights

        arrays = message.content["arrays"]
        return Weights({name: arrays[name].numpy() for name in arrays})  # type: ignore[index,union-attr]

    def record_of(model: Any) -> ArrayRecord:
        return ArrayRecord({name: Array(np.asarray(value)) for name, value in model.items()})

    def nothing(*_: Any) -> None:
        return None

    @client.train()
    def train(message: Message, context: Context) -> Message:
        task = task_of(int(context.node_config["partition-id"]))
        model, count, _ = task.train(weights_of(message), {**SETTINGS, "seed": 1}, nothing)
        arrays = record_of(model)
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": count})}
        return Message(RecordDict(content), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        task = task_of(int(context.node_config["partition-id"]))
        count, metrics, *_ = task.evaluate(weights_of(message), SETTINGS, nothing)
        content = {"metrics": MetricRecord({**metrics, "num-examples": count})}
        return Message(RecordDict(content), reply_to=message)

    at: list[float] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        from agent.tasks.demo.mnist import Mnist

        first = record_of(Mnist().init(0, SETTINGS))
        share = per_round / peers
        FedAvg(share, share, per_round, per_round, peers).start(
            grid, first, rounds, evaluate_fn=lambda number, arrays: at.append(time.monotonic())
        )

    began = time.monotonic()
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, peers, backend_config=resources)
    seconds = [after - before for before, after in pairwise(at)]
    return {
        "round_s": statistics.median(seconds[1:] or seconds),
        "whole_s": time.monotonic() - began,
        "start_s": at[0] - began,
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
        run = {
            "ours": lambda: ours(*sizes, ""),
            "ours on Ray": lambda: ours(*sizes, "auto"),
            "stock": lambda: stock(*sizes),
        }
        print(json.dumps(run[asked.alone]()))
        return
    names = ["ours", *["ours on Ray"] * asked.ray, *["stock"] * asked.stock]
    words = ["--peers", "--per-round", "--rounds"]
    pairs = [word for pair in zip(words, map(str, sizes), strict=True) for word in pair]
    found = {name: measured(name, pairs) for name in names}
    for name, row in found.items():
        print(name, json.dumps(row))
    if asked.keep:
        report.keep("simulation", {f"{asked.peers} peers": {"per_round": asked.per_round, **found}})


if __name__ == "__main__":
    main()
