"""A task whose update and loss are known to a test, which searches what leaves for them."""

from __future__ import annotations

import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome
from protocols.model.weights import Schema, TensorSpec, Weights

SHAPES = {"b": (7,), "w": (40, 3)}
LOSS, EXAMPLES = 0.76543217, 48


def change() -> Weights:
    """What training adds to a version."""
    draw = np.random.default_rng(4711)
    return Weights(
        {n: draw.normal(0, 0.05, shape).astype(np.float32) for n, shape in SHAPES.items()}
    )


class Secret:
    """Adds `change` to the version."""

    def schema(self, settings: Settings) -> Schema:
        return {name: TensorSpec("F32", shape) for name, shape in SHAPES.items()}

    def init(self, seed: int, settings: Settings) -> Weights:
        return Weights({n: np.zeros(shape, np.float32) for n, shape in SHAPES.items()})

    def load(self, data: DataSettings) -> None:
        """There is no data."""

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        for step in range(3):
            on_step(step + 1, 3, LOSS, 16 * (step + 1))
        moved = {name: weights[name] + array for name, array in change().items()}
        return TrainOutcome(moved, EXAMPLES, {"train_loss": LOSS})

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        return EvalOutcome(EXAMPLES, {"loss": LOSS})
