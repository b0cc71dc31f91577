"""A task made of a scikit-learn estimator and a data set.

    class Risk(cw.SklearnTask):
        classes = (0, 1)

        def model(self, settings):
            return SGDClassifier(loss="log_loss")

        def data(self, source, settings):
            return (x_train, y_train), (x_test, y_test)

The estimator learns by `partial_fit`: linear models by SGD (`SGDClassifier`, `SGDRegressor`,
`Perceptron`), or `MLPClassifier` and `MLPRegressor`. A linear model begins at 0. Its parameters
travel as float32. The same inputs give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.training import (
    csv_rows,
    evaluation,
    rng_state,
    shared_data,
    sklearn_local,
    task_settings,
)
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.seeds import random_state
from agent.tasks.training.sklearn_local import Numbers, Part
from agent.tasks.training.task_settings import TaskSettings
from protocols.errors import DataError, TaskUnusable, UsageError
from protocols.model.setting_specs import SettingSpec
from protocols.model.weights import Array, Schema, Weights

EVALUATION_BATCH = 1024
#: Settings of the training; those of the optimizer are the estimator's own.
_LOOP = {
    "epochs": SettingSpec(default=5, ge=1, help="passes over this peer's examples"),
    "batch_size": SettingSpec(default=32, ge=1, help="examples in a step"),
}


class SklearnTask(sklearn_local.ComparesSklearnModels, task_settings.WithSettings):
    """A task of a user's own, of `model` and `data`, and of `classes` for a classifier."""

    version = ""
    #: The classes of a classifier, the same on all peers; empty for a regression.
    classes: ClassVar[Sequence[Any]] = ()
    Settings: ClassVar[type | None] = None
    _known: Mapping[str, SettingSpec] = _LOOP

    # --- for users ---

    def model(self, settings: Any) -> Any:
        """The estimator."""
        raise task_settings.lacks(self, "model(self, settings)")

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
        """What is trained on, and what is held out: each (x [n, features], y [n])."""
        raise task_settings.lacks(self, "data(self, source, settings)")

    def metrics(self, model: Any, x: Numbers, y: Numbers) -> Mapping[str, float]:
        """Means over a batch, beside the loss: of classes the "accuracy"."""
        return {"accuracy": float((model.predict(x) == y).mean())} if len(self.classes) else {}

    def inputs(self, path: str, settings: Any) -> Any:
        """What predictions are for: an array [n, features], or batches; by default of a file .npy,
        or of numbers in a CSV file."""
        if path.endswith(".npy"):
            return [np.load(path, allow_pickle=False)]
        return csv_rows.Table(path)

    # --- Task ---

    def __init__(self) -> None:
        self._data = DataSettings()
        self._sets: tuple[object, tuple[Part, Part]] | None = None

    def load(self, data: DataSettings) -> None:
        """Store the data settings; the data are read when the settings of the run are known."""
        self._data, self._sets = data, None

    def setting_specs(self) -> Mapping[str, SettingSpec]:
        """All settings by name, with their types, bounds and help."""
        return task_settings.shareable(self._known)

    def schema(self, settings: RunSettings) -> Schema:
        return self.init(0, settings).schema

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """0 for a linear model, else the estimator's own first weights."""
        width = self._parts(settings)[0][0].shape[1]
        found = _tensors_of(self._begun(settings, width, "init", seed))
        linear = "coef" in found
        return Weights(
            {n: (np.zeros_like if linear else np.asarray)(a, np.float32) for n, a in found.items()}
        )

    def count_examples(self, settings: RunSettings) -> tuple[int, int]:
        """How many examples `train` and `evaluate` use."""
        train, held_out = self._parts(settings)
        return len(train[1]), len(held_out[1])

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """`epochs` passes over this peer's examples; the metric "loss" is that at the end."""
        plan, (x, y) = self._read(settings), self._trained_on(settings)
        model = self._loaded(weights, settings)
        passed = max(plan.round - 1, 0) * plan.epochs * len(y)
        if hasattr(model, "t_"):  # what the estimator's schedule of its learning rate counts
            model.t_ = type(model.t_)(passed + 1)
        size = max(plan.batch_size, int(settings.get("min_batch", 1)))
        cuts = list(range(size, len(y) - size + 1, size))  # a small last batch joins the one before
        steps, done, examples = plan.epochs * (len(cuts) + 1), 0, 0
        for epoch in range(plan.epochs):
            order = random_state("order", plan.seed, plan.round, self._data.index, epoch)
            for rows in np.split(order.permutation(len(y)), cuts):
                model.partial_fit(x[rows], y[rows])
                done, examples = done + 1, examples + len(rows)
                on_step(done, steps, math.nan, examples)
        found = {n: np.asarray(a, np.float32) for n, a in _tensors_of(model).items()}
        return TrainOutcome(Weights(found), len(y), {"loss": self._loss(model, x, y)})

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """The means of "loss" and `metrics` over this peer's held-out examples."""
        x, y = self._parts(settings)[1]
        model = self._loaded(weights, settings)

        def measure(first: int) -> BatchResult:
            part = slice(first, first + EVALUATION_BATCH)
            found = {"loss": self._loss(model, x[part], y[part])}
            found |= self.metrics(model, x[part], y[part])
            count = len(y[part])
            return BatchResult(count, {name: value * count for name, value in found.items()})

        return evaluation.evaluate(range(0, len(y), EVALUATION_BATCH), measure, on_step)

    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each example at `source`: its number, and its class and probability or its value."""
        first, width = 0, weights["coef" if "coef" in weights else "coefs.0"].shape
        model = self._loaded(weights, settings, width[-1 if "coef" in weights else 0])

        def answer(x: Numbers) -> dict[str, Sequence[Any]]:
            made = model.predict(x).tolist()
            if not len(self.classes):
                return {"value": made}
            if not hasattr(model, "predict_proba"):
                return {"class": made}
            return {"class": made, "probability": model.predict_proba(x).max(1).tolist()}

        inputs = self.inputs(source, self._read(settings))
        for batch in inputs:
            columns = csv_rows.fitted(answer, np.asarray(batch, np.float64), inputs)
            yield {"row": range(first, first + len(batch)), **columns}
            first += len(batch)

    # --- helpers ---

    def _read(self, settings: RunSettings) -> TaskSettings:
        merged = task_settings.read_own(settings, self._known, self.Settings)
        given = {"seed": settings.get("seed", 0), "round": int(settings.get("round", 0))}
        return TaskSettings({**merged, **given})

    def _parts(self, settings: RunSettings) -> tuple[Part, Part]:
        read = self._read(settings)
        key = {**read, "seed": 0, "round": 0}
        if self._sets is None or self._sets[0] != key:
            self._sets = None
            train, held_out = shared_data.read(self, self._data, read, key, _take)
            self._sets = key, (self._checked(train), self._checked(held_out))
        return self._sets[1]

    def _checked(self, part: Any) -> Part:
        x, y = np.asarray(part[0], np.float64), np.asarray(part[1])
        if x.ndim != 2 or len(x) != len(y):
            raise UsageError(
                f"x {x.shape} and y {y.shape} are no examples", "x [n, features], y [n]"
            )
        if len(self.classes) and not np.isin(y, self.classes).all():
            raise DataError("an example has a class that is not one of `classes` of the task")
        return x, y

    def _begun(self, settings: RunSettings, width: int, *words: object) -> Any:
        """An estimator that has its parameters."""
        with rng_state.seeded(*(words or ("model",))):
            model = self.model(self._read(settings))
            if not hasattr(model, "partial_fit"):
                raise TaskUnusable(
                    f"{type(model).__name__} has no partial_fit, so it cannot go on from a version",
                    "SGDClassifier, SGDRegressor, Perceptron, MLPClassifier or MLPRegressor",
                )
            y = np.asarray(self.classes) if len(self.classes) else np.zeros(1)
            options = {"classes": y} if len(self.classes) else {}
            model.partial_fit(np.zeros((len(y), width)), y, **options)
        return model

    def _loaded(self, weights: Weights, settings: RunSettings, width: int = 0) -> Any:
        width = width or self._parts(settings)[0][0].shape[1]
        model = self._begun(settings, width)
        for name, array in _tensors_of(model).items():
            array[...] = weights[name]
        vars(model).pop("_optimizer", None)  # of the first step of an MLP
        return model

    def _loss(self, model: Any, x: Numbers, y: Numbers) -> float:
        """Cross-entropy, or the share of wrong classes without probabilities; squared error."""
        found = sklearn_local.measure(model, x, y, is_classifier=bool(len(self.classes)))
        return float(found["loss"].mean())


def _take(found: Any, data: DataSettings, *, held_out: bool = False) -> Any:
    """This peer's examples of a data set that all peers share."""
    return shared_data.take_arrays(tuple(map(np.asarray, found)), data, held_out=held_out)


def _tensors_of(model: Any) -> dict[str, Array]:
    """The parameters themselves by name. Raises TaskUnusable."""
    if hasattr(model, "coefs_"):
        pairs = [("coefs", model.coefs_), ("intercepts", model.intercepts_)]
        return {f"{name}.{place}": a for name, arrays in pairs for place, a in enumerate(arrays)}
    if hasattr(model, "coef_"):
        return {"coef": model.coef_, "intercept": model.intercept_}
    raise TaskUnusable(f"{type(model).__name__} is neither a linear model nor an MLP")
