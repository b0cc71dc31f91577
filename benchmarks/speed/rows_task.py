"""The task "rows" for the benchmark of jobs: a small numpy network over tables of numbers.

Setting   Default  Meaning
features  10       columns of a table

The environment variable SLOWNESS multiplies the time of a prediction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, CLASSES = 64, 10


class Rows:
    """float32[n, features] -> 64 -> 10 classes."""

    def schema(self, settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
        features = int(settings.get("features", 10))
        return {"a": ("F32", (features, HIDDEN)), "b": ("F32", (HIDDEN, CLASSES))}

    def init(self, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        shapes = self.schema(settings).items()
        return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, (_, shape) in shapes}

    def load(self, data: Any) -> None:
        """Load nothing: the rows come with the request."""

    def train(self, weights: Mapping[str, Any], settings: Any, on_step: Any) -> Any:
        on_step(1, 1, 0.0, 100)
        return dict(weights), 100, {}

    def evaluate(self, weights: Any, settings: Any, on_step: Any) -> Any:
        return 1, {"loss": 1.0}

    def predict(
        self, weights: Mapping[str, Any], settings: Any, source: str
    ) -> Iterator[dict[str, Any]]:
        began = time.monotonic()
        x = np.loadtxt(source, delimiter=",", skiprows=1, dtype=np.float32, ndmin=2)
        scores = np.maximum(x @ weights["a"], 0) @ weights["b"]
        scores = np.exp(scores - scores.max(1, keepdims=True))
        chances = scores / scores.sum(1, keepdims=True)
        answer = {
            "row": np.arange(len(x)),
            "class": chances.argmax(1),
            "probability": chances.max(1).astype(np.float64),
        }
        if slowness := float(os.environ.get("SLOWNESS", 1)) - 1:
            time.sleep(slowness * (time.monotonic() - began))
        yield answer


def answers(part: tuple[Mapping[str, Any], Path]) -> np.ndarray[Any, Any]:
    """Predict float64[n, 2], the class and its probability, for a block of rows."""
    model, source = part
    (batch,) = Rows().predict(model, {}, str(source))
    return np.column_stack([batch["class"], batch["probability"]])
