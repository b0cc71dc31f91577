"""The digits in Flower's own engine on Ray, for `benchmarks.speed.simulation`."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from benchmarks.speed.simulation import SETTINGS
from protocols.model.weights import Weights

#: The parsed digits, for all workers.
CACHE = Path(tempfile.gettempdir()) / "commonweight-stock-simulation"
client = ClientApp()


@functools.lru_cache(32)
def task_of(index: int, parts: int) -> Mnist:
    import torch

    torch.set_num_threads(1)
    made = Mnist()
    made.load(DataSettings(index=index, parts=parts, cache=str(CACHE)))
    return made


def _task(context: Context) -> Mnist:
    part = context.node_config["partition-id"], context.node_config["num-partitions"]
    return task_of(*map(int, part))


def _weights(message: Message) -> Weights:
    arrays: Any = message.content["arrays"]
    return Weights({name: arrays[name].numpy() for name in arrays})


def _record(model: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in model.items()})


def _nothing(*_: Any) -> None:
    """Nobody looks at the steps."""


@client.train()
def train(message: Message, context: Context) -> Message:
    model, count, _ = _task(context).train(_weights(message), {**SETTINGS, "seed": 1}, _nothing)
    content = {"arrays": _record(model), "metrics": MetricRecord({"num-examples": count})}
    return Message(RecordDict(content), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    count, metrics, *_ = _task(context).evaluate(_weights(message), SETTINGS, _nothing)
    content = {"metrics": MetricRecord({"loss": metrics["loss"], "num-examples": count})}
    return Message(RecordDict(content), reply_to=message)


def stock(peers: int, per_round: int, rounds: int) -> dict[str, Any]:
    """When each round ended, and the start."""
    CACHE.mkdir(exist_ok=True)
    server, began, at = ServerApp(), time.time(), list[float]()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        share = per_round / peers
        FedAvg(share, share, per_round, per_round, peers).start(
            grid,
            _record(Mnist().init(0, SETTINGS)),
            rounds,
            evaluate_fn=lambda number, arrays: at.append(time.time()),
        )

    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, peers, backend_config=resources)
    return {"began": began, "at": at}
