"""The task "ping": measures the time of a round for weights of a given size, without training.

It needs neither torch nor data.
"""

from __future__ import annotations

import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome, merge_settings
from protocols.model.weights import Schema, TensorSpec, Weights

_DEFAULTS = {"kilobytes": 10}


class Ping:
    """Settings: `kilobytes`, the size of the weights (float32, in tensors of at most 4 MB)."""

    def schema(self, settings: Settings) -> Schema:
        count = int(merge_settings(settings, _DEFAULTS)["kilobytes"]) * 256
        largest = 1 << 20
        sizes = [largest] * (count // largest) + ([count % largest] if count % largest else [])
        return {f"block{i:05}": TensorSpec("F32", (size,)) for i, size in enumerate(sizes)}

    def init(self, seed: int, settings: Settings) -> Weights:
        rng = np.random.default_rng(seed)
        return Weights(
            {
                name: rng.standard_normal(spec.shape, np.float32)
                for name, spec in self.schema(settings).items()
            }
        )

    def load(self, data: DataSettings) -> None:
        """There is no data."""

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        # Changes each round: agents do not download a version that they already have.
        moved = {name: np.add(array, 1, dtype=np.float32) for name, array in weights.items()}
        return TrainOutcome(moved, 1, {})

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        return EvalOutcome(1, {})
