"""The ServerApp: FedAvg over `kilobytes` of float32 in tensors of at most 4 MB.

Appends a JSON line to the file `times` at the start and at the end of each round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

_LARGEST = 1 << 20


class Timed(FedAvg):
    """FedAvg that records when a round starts (before sampling) and ends (after evaluation)."""

    def __init__(self, times: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._times = times

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._note(server_round, "began")
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        found = super().aggregate_evaluate(server_round, replies)
        self._note(server_round, "ended")
        return found

    def _note(self, server_round: int, what: str) -> None:
        with self._times.open("a") as file:
            file.write(json.dumps({"round": server_round, what: time.time()}) + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    agents, count = int(config["agents"]), int(config["kilobytes"]) * 256
    sizes = [_LARGEST] * (count // _LARGEST) + ([count % _LARGEST] if count % _LARGEST else [])
    rng = np.random.default_rng(0)
    arrays = ArrayRecord(
        {
            f"block{number:05}": Array(rng.standard_normal(size, np.float32))
            for number, size in enumerate(sizes)
        }
    )
    strategy = Timed(
        Path(str(config["times"])),
        min_train_nodes=agents,
        min_evaluate_nodes=agents,
        min_available_nodes=agents,
    )
    strategy.start(grid, arrays, num_rounds=int(config["rounds"]))
