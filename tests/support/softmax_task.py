"""The task "softmax" in numpy: gradient descent with support for SCAFFOLD.

Setting  Default  Meaning
steps    1        steps of gradient descent on all of this peer's examples
lr       0.1
norm     false    scale and shift the features first, by the tensors norm.scale and norm.shift
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import OnStep, Settings, merge_settings
from protocols.model.weights import Array, Schema, TensorSpec, Weights
from tests.support.in_process_fleet import CLASSES, Data, first_weights, some_data

FEATURES = 5
SIZES = (30, 70, 200)
DEFAULTS = {"steps": 1, "lr": 0.1, "norm": False}
NAME = "tests.support.softmax_task:Softmax"


def part(index: int) -> Data:
    return some_data(SIZES[index % len(SIZES)], index, FEATURES)


class Softmax:
    """Softmax regression; data part `index` is `part(index)`."""

    def schema(self, settings: Settings) -> Schema:
        schema = {"w": TensorSpec("F32", (FEATURES, CLASSES)), "b": TensorSpec("F32", (CLASSES,))}
        if merge_settings(settings, DEFAULTS)["norm"]:
            schema |= {f"norm.{n}": TensorSpec("F32", (FEATURES,)) for n in ("scale", "shift")}
        return schema

    def init(self, seed: int, settings: Settings) -> Weights:
        first = dict(first_weights(FEATURES, seed))
        if merge_settings(settings, DEFAULTS)["norm"]:
            first["norm.scale"] = np.ones(FEATURES, np.float32)
            first["norm.shift"] = np.zeros(FEATURES, np.float32)
        return Weights(first)

    def load(self, data: DataSettings) -> None:
        self.data = part(data.index)
        self._correction: Mapping[str, Array] = {}

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> Any:
        chosen = merge_settings(settings, DEFAULTS)
        model, lr = dict(weights), np.float32(chosen["lr"])
        for step in range(int(chosen["steps"])):
            for name, gradient in self.gradient(Weights(model), settings).items():
                model[name] = model[name] - lr * (gradient + self._correction.get(name, 0))
            on_step(step + 1, int(chosen["steps"]), 0.0, (step + 1) * len(self.data.y))
        self._correction = {}
        return model, len(self.data.y), {"loss": 1.0}

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> Any:
        odds = self._odds(weights)[0][np.arange(len(self.data.y)), self.data.y]
        return len(self.data.y), {"loss": float(-np.log(odds).mean())}

    def steer(self, correction: Mapping[str, Array]) -> None:
        self._correction = correction

    def lr_times_steps(self, settings: Settings) -> float:
        chosen = merge_settings(settings, DEFAULTS)
        return float(chosen["steps"]) * float(chosen["lr"])

    def gradient(self, weights: Weights, settings: Settings) -> dict[str, Any]:
        odds, x = self._odds(weights)
        error = odds
        error[np.arange(len(self.data.y)), self.data.y] -= 1
        error /= np.float32(len(self.data.y))
        found = {"w": x.T @ error, "b": error.sum(0)}
        if "norm.scale" in weights:
            back = error @ np.asarray(weights["w"]).T
            found |= {"norm.scale": (back * self.data.x).sum(0), "norm.shift": back.sum(0)}
        return found

    def _odds(self, weights: Mapping[str, Array]) -> tuple[Any, Any]:
        x = self.data.x
        if "norm.scale" in weights:
            x = x * np.asarray(weights["norm.scale"]) + np.asarray(weights["norm.shift"])
        scores = x @ np.asarray(weights["w"]) + np.asarray(weights["b"])
        odds = np.exp(scores - scores.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True), x


class Unsteerable:
    """The same task without support for SCAFFOLD."""

    schema, init, load, evaluate = Softmax.schema, Softmax.init, Softmax.load, Softmax.evaluate

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> Any:
        return dict(weights), 1, {}
