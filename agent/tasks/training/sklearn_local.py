"""Trains an estimator on one machine alone, and measures it row by row: `ComparesModels` for
scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from agent.tasks import OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.capabilities import LocalRounds
from agent.tasks.training.seeds import split_aside
from protocols.errors import UsageError
from protocols.model.weights import Weights

Numbers = npt.NDArray[Any]
Part = tuple[Numbers, Numbers]
RowMetrics = dict[str, npt.NDArray[np.float64]]
#: A probability in the cross-entropy is at least this.
_LEAST = 1e-15


class ComparesSklearnModels:
    """The methods of `ComparesModels`, for `SklearnTask`."""

    _aside = 0

    def local_rounds(self, settings: RunSettings, rounds: int) -> LocalRounds:
        """As many as the run had."""
        return LocalRounds(rounds)

    def set_aside(self, share: int) -> None:
        """Leave one in `share` training examples out of the next trainings; 0: none."""
        self._aside = share

    def continued(self, weights: Weights, settings: RunSettings) -> Weights:
        """The shared model as it is."""
        return weights

    def pull_to(self, version: Weights | None, mu: float) -> None:
        """Raises UsageError: a step of `partial_fit` has no proximal term."""
        if version is not None:
            raise UsageError("an estimator cannot be kept near a version", "--personal finetune")

    def train_locally(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> Weights:
        """A round of training, as in the run."""
        return Weights(dict(self.train(weights, settings, on_step).weights))

    def measure_rows(
        self, weights: Weights, settings: RunSettings, on_step: OnStep, *, aside: bool
    ) -> RowMetrics:
        """The loss of each example, and of classes the accuracy, the class and the prediction."""
        x, y = self._divide(settings)[1] if aside else self._parts(settings)[1]
        model = self._loaded(weights, settings)
        return measure(model, x, y, is_classifier=bool(len(self.classes)))

    # --- helpers ---

    def _trained_on(self, settings: RunSettings) -> Part:
        """The examples of the next training."""
        return self._divide(settings)[0] if self._aside else self._parts(settings)[0]

    def _divide(self, settings: RunSettings) -> tuple[Part, Part]:
        """The examples that are trained on, and those that are set aside."""
        x, y = self._parts(settings)[0]
        kept, aside = split_aside(len(y), self._data.index, self._aside)
        return (x[kept], y[kept]), (x[aside], y[aside])

    # --- what `SklearnTask` has ---

    classes: ClassVar[Sequence[Any]]
    _data: Any

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        raise NotImplementedError

    def _parts(self, settings: RunSettings) -> tuple[Part, Part]:
        raise NotImplementedError

    def _loaded(self, weights: Weights, settings: RunSettings, width: int = 0) -> Any:
        raise NotImplementedError


def measure(model: Any, x: Numbers, y: Numbers, *, is_classifier: bool) -> RowMetrics:
    """By name float64[n]. The "loss" is the cross-entropy, or without probabilities 1 for a wrong
    class; of numbers the squared error."""
    made = model.predict(x)
    if not is_classifier:
        squares = np.square(np.asarray(made, np.float64) - y)
        return {"loss": squares, "mse": squares, "mae": np.sqrt(squares)}
    known = model.classes_
    right = (made == y).astype(np.float64)
    places = {"class": np.searchsorted(known, y), "guess": np.searchsorted(known, made)}
    found = {"accuracy": right} | {n: of.astype(np.float64) for n, of in places.items()}
    if not hasattr(model, "predict_proba"):
        return {**found, "loss": 1 - right}
    chances = np.maximum(model.predict_proba(x), _LEAST)
    if len(known) == 2:
        found["log_odds"] = np.log(chances[:, 1]) - np.log(chances[:, 0])
    return {**found, "loss": -np.log(chances[np.arange(len(y)), places["class"]])}
