"""A task whose updates, losses and tallies are known to a test, and differ from peer to peer."""

from __future__ import annotations

import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome
from protocols.model.weights import Schema, TensorSpec, Weights

SHAPES = {"b": (1000,), "w": (300, 200)}
EXAMPLES = (48, 80, 112)
LOSSES = (0.76543217654, 1.23456712345, 2.34567823456)
#: A tally "regression" of the peers, without its first number.
SUMS = (91.827364554637, 63.728190091827, 12.345678987654, 74.185296307418)


def first() -> Weights:
    """The first version."""
    return _draw(1, 0.3)


def change(peer: int) -> Weights:
    """What the training of a peer adds to a version."""
    return _draw(4711 + peer, 0.05)


def tally(peer: int) -> list[float]:
    return [float(EXAMPLES[peer]), *(number * (peer + 1) for number in SUMS)]


def _draw(seed: int, scale: float) -> Weights:
    draw = np.random.default_rng(seed)
    return Weights({n: draw.normal(0, scale, s).astype(np.float32) for n, s in SHAPES.items()})


class Planted:
    """Adds `change` to the version; `LOSSES` is the loss."""

    def schema(self, settings: Settings) -> Schema:
        return {name: TensorSpec("F32", shape) for name, shape in SHAPES.items()}

    def init(self, seed: int, settings: Settings) -> Weights:
        return first()

    def load(self, data: DataSettings) -> None:
        self.peer = data.index

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        loss, examples = LOSSES[self.peer], EXAMPLES[self.peer]
        on_step(1, 1, loss, examples)
        moved = {name: weights[name] + array for name, array in change(self.peer).items()}
        return TrainOutcome(moved, examples, {"train_loss": loss})

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        found = {"regression": tally(self.peer)}
        return EvalOutcome(EXAMPLES[self.peer], {"loss": LOSSES[self.peer]}, found)
