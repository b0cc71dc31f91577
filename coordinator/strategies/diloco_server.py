"""DiLoCo's server as a Flower strategy: Nesterov momentum on the mean change of a round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from coordinator.strategies.adapter import Arrays


class DiLoCo(FedAvg):
    """θ ← θ - lr (Δ + β m), where Δ = θ - mean and m ← β m + Δ (arXiv 2311.08105, algorithm 1).

    `base`: the arrays at the start of the round; `momentum`: m, empty before the first round. Both
    have the names of the arrays in replies.
    """

    def __init__(
        self, server_learning_rate: float = 0.7, server_momentum: float = 0.9, **flower: Any
    ) -> None:
        super().__init__(**flower)
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum
        self.base: Arrays = {}
        self.momentum: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.base = self.base or {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None:
            return mean, metrics
        moved: dict[str, npt.NDArray[Any]] = {}
        momentum: dict[str, npt.NDArray[Any]] = {}
        for name, array in mean.items():
            base = self.base[name]
            change = base - array.numpy()
            speed = change + self.server_momentum * self.momentum.get(name, 0.0)
            momentum[name] = speed.astype(base.dtype)
            step = self.server_learning_rate * (change + self.server_momentum * speed)
            moved[name] = np.asarray((base - step).astype(base.dtype))
        self.base, self.momentum = moved, momentum
        return ArrayRecord({name: Array(array) for name, array in moved.items()}), metrics
