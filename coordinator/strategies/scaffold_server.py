"""SCAFFOLD's server as a Flower strategy (arXiv 1910.06378, algorithm 1, lines 16 and 17)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from protocols.model import personalization

#: The share of peers with an update in the round: |S| / N.
PARTICIPATION = "participation"


class Scaffold(FedAvg):
    """Moves the model by its mean change, and c by the mean change of the c_i times |S| / N.

    `base`: the arrays at the start of the round, with the names of the arrays in replies.
    """

    def __init__(self, server_learning_rate: float = 1.0, **flower: Any) -> None:
        super().__init__(**flower)
        self.server_learning_rate = server_learning_rate
        self.base: Mapping[str, npt.NDArray[Any]] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None or metrics is None:
            return mean, metrics
        participation = metrics.get(PARTICIPATION, 1.0)
        assert isinstance(participation, float), "a share is one number"
        moved = {}
        for name, array in mean.items():
            rate = participation if personalization.is_control(name) else self.server_learning_rate
            to = array.numpy()
            if rate != 1.0:
                base = self.base[name]
                to = (base + rate * (to - base)).astype(to.dtype)
            moved[name] = Array(np.asarray(to))
        return ArrayRecord(moved), metrics
