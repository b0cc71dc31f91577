"""A task made of a Keras 3 model and a data set, on TensorFlow.

    class Gait(cw.KerasTask):
        def model(self, settings):
            return keras.Sequential([keras.Input((600,)), keras.layers.Dense(7)])

        def data(self, source, settings):
            return (x_train, y_train), (x_test, y_test)

On a CPU the same inputs give the same bytes. Training that continues after a kill has the same
result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import Settings as RunSettings
from agent.tasks.training import csv_rows, shared_data, task_settings
from agent.tasks.training.keras_loop import EVALUATION_BATCH, Examples, KerasLoop, Part
from agent.tasks.training.task_settings import TaskSettings
from protocols.errors import UsageError
from protocols.model.weights import Weights


class KerasTask(KerasLoop):
    """A task of a user's own, of `model` and `data`. `loss`, `metrics` and the other methods may be
    overridden; `Settings` is as in `TorchTask`."""

    version = ""

    # --- for users ---

    def model(self, settings: Any) -> Any:
        """The `keras.Model`, which begins with `keras.Input`. A classifier gives logits."""
        raise task_settings.lacks(self, "model(self, settings)")

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
        """What is trained on, and what is held out: each (x [n, …], y [n]), arrays, or what arrays
        of row numbers index. `source.path`: the path that the owner gave."""
        raise task_settings.lacks(self, "data(self, source, settings)")

    def optimizer(self, model: Any, settings: Any) -> Any:
        """An optimizer of Keras; None: the one that the settings name."""
        return None

    def inputs(self, path: str, settings: Any) -> Any:
        """Inputs to predict for: an array [n, …], or batches; by default of a file .npy, or of
        numbers in a CSV file."""
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        return csv_rows.Table(path)

    def answers(self, output: Any, settings: Any) -> Mapping[str, Sequence[Any]]:
        """Columns of predictions: of several numbers an example, the class with the largest and its
        probability; of one, the value."""
        found = np.asarray(output)
        if found.ndim != 2 or found.shape[1] == 1:
            return {"value": found.ravel().tolist()}
        chances = np.asarray(keras.ops.softmax(found))
        return {"class": chances.argmax(1).tolist(), "probability": chances.max(1).tolist()}

    # --- Task ---

    def build(self, settings: RunSettings) -> Any:
        return self.model(self._read(settings))

    def read(self, data: DataSettings, settings: RunSettings) -> Examples:
        read = self._read(settings)
        sets = shared_data.read(self, data, read, {**read, "seed": 0, "round": 0}, _take)
        return Examples(*map(_part, sets))

    def make_optimizer(self, model: Any, settings: RunSettings) -> Any:
        own = self.optimizer(model, self._read(settings))
        return super().make_optimizer(model, settings) if own is None else own

    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each example at `source`: its number, and the columns of `answers`."""
        model, read, first = self._loaded(weights, settings), self._read(settings), 0
        found = inputs = self.inputs(source, read)
        if isinstance(found, np.ndarray):
            found = np.split(found, range(EVALUATION_BATCH, len(found), EVALUATION_BATCH))
        for x in found:
            output = csv_rows.fitted(partial(model, training=False), x, inputs)
            columns = self.answers(output, read)
            yield {"row": range(first, first + len(x)), **columns}
            first += len(x)

    # --- helpers ---

    def _read(self, settings: RunSettings) -> TaskSettings:
        return task_settings.read(settings, self._known, self.Settings)


def _take(found: Any, data: DataSettings, *, held_out: bool = False) -> Part:
    """This peer's rows of a data set that all peers share."""
    whole = _part(found)
    rows = shared_data.rows_of(len(whole.y), lambda: whole.y, data, held_out=held_out)
    return whole._replace(rows=rows)


def _part(found: Any) -> Part:
    if isinstance(found, Part):
        return found
    x, y = (np.asarray(each) if isinstance(each, list) else each for each in found)
    if len(x) != len(y):
        raise UsageError(f"{len(x)} inputs and {len(y)} targets are no examples", "x [n, …], y [n]")
    return Part(x, y, np.arange(len(y)))
