"""What trees can learn: gradients and hessians of a loss for each row. Pure.

As in XGBoost, with the same names for the parameters. A margin is the sum of `start` and the leaves
of a row, one for each output.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.errors import UsageError

Floats = npt.NDArray[np.float64]

NAMES = ("auto", "logistic", "multiclass", "squared", "poisson")
#: Numbers to predict, and predictions of them, are clipped to this many standard deviations from
#: the mean. Gradients are not clipped: each is linear in the target of its row, so no prediction
#: can make a sum of gradients depend on a few rows alone.
MAX_DEVIATIONS = 16.0
#: XGBoost's max_delta_step of count:poisson, and what its hessians are multiplied by.
POISSON_STEP = 0.7


class Gradients(NamedTuple):
    """float64[n, outputs] each."""

    gradient: Floats
    hessian: Floats


class Objective(NamedTuple):
    """A loss. `constant`, `bound`, `max_step`: see `layout.Numbers`. `mean` and `scale` scale a
    target that is a number."""

    name: str
    outputs: int
    start: float
    constant: float
    bound: float
    max_step: float = 0.0
    mean: float = 0.0
    scale: float = 1.0

    def gradients(self, margins: Floats, y: npt.NDArray[Any]) -> Gradients:
        """Of margins float64[n, outputs] and targets: int64[n] classes or float32[n, 1] scaled."""
        match self.name:
            case "logistic":
                p = expit(margins)
                return Gradients(p - y.reshape(-1, 1), np.maximum(p * (1 - p), 1e-16))
            case "multiclass":
                p = softmax(margins)
                truth = np.arange(self.outputs) == y.reshape(-1, 1)
                return Gradients(p - truth, np.maximum(2 * p * (1 - p), 1e-16))
            case "poisson":
                rate = np.minimum(np.exp(np.minimum(margins, 50.0)), self.bound / 2)
                truth = y.astype(np.float64) * self.scale + self.mean
                slope = rate - np.clip(truth, 0.0, self.bound / 2)
                return Gradients(slope, rate * math.exp(POISSON_STEP))
            case _:
                most = self.bound / 2
                slope = np.clip(margins, -most, most) - np.clip(y, -most, most)
                return Gradients(slope, np.ones_like(margins))

    def outputs_of(self, margins: Floats) -> Floats:
        """What a model of the task tabular says: logits float64[n, classes], or scaled numbers."""
        match self.name:
            case "logistic":
                return np.concatenate([np.zeros_like(margins), margins], 1)
            case "poisson":
                return (np.exp(np.minimum(margins, 50.0)) - self.mean) / self.scale
            case _:
                return margins


def choose(name: str, classes: int, mean: float, scale: float) -> Objective:
    """The objective for a target with this number of classes (0: a number). Raises UsageError."""
    wanted = name if name != "auto" else {0: "squared", 2: "logistic"}.get(classes, "multiclass")
    if (classes == 0) is not (wanted in ("squared", "poisson")) or (
        wanted == "logistic" and classes != 2
    ):
        kind = f"{classes} classes" if classes else "a number"
        raise UsageError(f"objective={name} does not fit the target, which is {kind}")
    match wanted:
        case "logistic":
            return Objective("logistic", 1, 0.0, 0.25, 1.0)
        case "multiclass":
            return Objective("multiclass", classes, 0.0, 0.5, 1.0)
        case "poisson":
            if not mean > 0:
                raise UsageError("objective=poisson needs a target of counts, 0 or more")
            bound = 2 * MAX_DEVIATIONS * max(scale, mean)
            bend = mean * math.exp(POISSON_STEP)
            start = math.log(mean)
            return Objective("poisson", 1, start, bend, bound, POISSON_STEP, mean, scale)
        case _:
            return Objective("squared", 1, 0.0, 1.0, 2 * MAX_DEVIATIONS, 0.0, mean, scale)


def expit(margins: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-np.clip(margins, -700.0, 700.0)))


def softmax(margins: Floats) -> Floats:
    raised: Floats = np.exp(margins - margins.max(1, keepdims=True))
    raised /= raised.sum(1, keepdims=True)
    return raised
