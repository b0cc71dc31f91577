"""The task "quick" in numpy: logistic regression on a small table, for every strategy.

Setting      Default  Meaning
steps        2        steps of gradient descent
lr           0.1
pause_s      0        seconds to wait in each step, so that a round lasts
kilobytes    0        size of a tensor beside the model; above 64 KB updates are uploaded
proximal_mu  0
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

FEATURES = 4
COLUMNS = (*(f"x{n}" for n in range(FEATURES)), "label")


def table(rows: int, seed: int) -> str:
    """A CSV text with this task's columns."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    labels = (x[:, 0] + x[:, 1] > 0).astype(int)
    lines = [
        ",".join([*(f"{v:.5f}" for v in row), str(y)]) for row, y in zip(x, labels, strict=True)
    ]
    return "\n".join([",".join(COLUMNS), *lines]) + "\n"


class Quick:
    def schema(self, settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
        schema: dict[str, tuple[str, tuple[int, ...]]] = {
            "w": ("F32", (FEATURES,)),
            "b": ("F32", (1,)),
            "norm.scale": ("F32", (FEATURES,)),
        }
        if kilobytes := int(settings.get("kilobytes", 0)):
            schema["ballast"] = ("F32", (kilobytes * 256,))
        return schema

    def init(self, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        return {
            name: rng.normal(0, 0.1, shape).astype(np.float32)
            for name, (_, shape) in self.schema(settings).items()
        }

    def load(self, data: Any) -> None:
        read = np.loadtxt(data.path, delimiter=",", skiprows=1, dtype=np.float32, ndmin=2)
        self.x, self.y = read[:, :FEATURES], read[:, FEATURES]
        self._correction: Mapping[str, Any] = {}
        self._momentum: dict[str, Any] = {}

    def train(self, weights: Mapping[str, Any], settings: Mapping[str, Any], on_step: Any) -> Any:
        model = dict(weights)
        lr, mu = np.float32(settings.get("lr", 0.1)), np.float32(settings.get("proximal_mu", 0))
        steps, pause_s = int(settings.get("steps", 2)), float(settings.get("pause_s", 0))
        for step in range(steps):
            time.sleep(pause_s)
            for name, gradient in self.gradient(model, settings).items():
                change = gradient + mu * (model[name] - weights[name])
                model[name] = model[name] - lr * (change + self._correction.get(name, 0))
            on_step(step + 1, steps, self._loss(model), (step + 1) * len(self.y))
        if "ballast" in model:
            model["ballast"] = np.add(model["ballast"], 0.001, dtype=np.float32)
        self._correction = {}
        self._momentum = {"m": np.zeros(FEATURES, np.float32)}
        return model, len(self.y), {"loss": self._loss(model)}

    def evaluate(self, weights: Mapping[str, Any], settings: Any, on_step: Any) -> Any:
        hits = float(((self._odds(weights, self.x) > 0.5) == self.y).mean())
        return len(self.y), {"loss": self._loss(weights), "accuracy": hits}

    def predict(
        self, weights: Mapping[str, Any], settings: Any, source: str
    ) -> Iterator[dict[str, Any]]:
        rows = np.loadtxt(source, delimiter=",", skiprows=1, dtype=np.float32, ndmin=2)
        odds = self._odds(weights, rows[:, :FEATURES])
        yield {"row": np.arange(len(rows)), "probability": odds.astype(np.float64)}

    # --- SCAFFOLD and DiLoCo, also by the names that older agents use ---

    def steer(self, correction: Mapping[str, Any]) -> None:
        self._correction = correction

    def lr_times_steps(self, settings: Mapping[str, Any]) -> float:
        return float(settings.get("lr", 0.1)) * int(settings.get("steps", 2))

    def gradient(self, weights: Mapping[str, Any], settings: Any) -> dict[str, Any]:
        error = (self._odds(weights, self.x) - self.y) / np.float32(len(self.y))
        back = self.x.T @ error
        found = {"w": back * weights["norm.scale"], "b": error.sum(keepdims=True)}
        found["norm.scale"] = back * weights["w"]
        if "ballast" in weights:
            found["ballast"] = np.zeros_like(weights["ballast"])
        return {name: value.astype(np.float32) for name, value in found.items()}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        self._momentum = dict(state)

    def optimizer_state(self) -> Mapping[str, Any]:
        return self._momentum

    path, recall, remembered = lr_times_steps, load_optimizer_state, optimizer_state

    def _odds(self, weights: Mapping[str, Any], x: Any) -> Any:
        scores = (x * weights["norm.scale"]) @ weights["w"] + weights["b"]
        return 1 / (1 + np.exp(-np.clip(scores, -30, 30)))

    def _loss(self, weights: Mapping[str, Any]) -> float:
        odds = np.clip(self._odds(weights, self.x), 1e-6, 1 - 1e-6)
        return float(-np.where(self.y > 0, np.log(odds), np.log(1 - odds)).mean())
