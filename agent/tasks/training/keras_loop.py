"""Local training of a Keras 3 model on TensorFlow; `torch_loop` does the same for torch.

`keras_task` has the task for users. Tensors travel with the paths and the layout of Keras, unless
the task converts them, as `agent.tasks.images.keras_task` does. `hyperparameters` has the settings.
On a CPU the same inputs give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Setting, Snapshot, TrainOutcome, Watch
from agent.tasks import Settings as RunSettings
from agent.tasks.training import evaluation, task_settings
from agent.tasks.training.batch_size import run_or_suggest_batch_size
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.hyperparameters import (
    Hyperparameters,
    read_hyperparameters,
    resolve_settings,
)
from agent.tasks.training.seeds import derive_seed
from protocols.errors import TaskUnusable, UsageError
from protocols.model.built_in_settings import LOOP
from protocols.model.setting_specs import SettingSpec
from protocols.model.weights import Array, Schema, Weights

EVALUATION_BATCH = 256

if keras.backend.backend() != "tensorflow":
    raise TaskUnusable(f"Keras runs on {keras.backend.backend()} here", "KERAS_BACKEND=tensorflow")
tf.config.experimental.enable_op_determinism()
if threads := int(os.environ.get("OMP_NUM_THREADS", "0")):
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


class Part(NamedTuple):
    """Examples [n, …] and [n, …], indexable by numpy rows, and the rows of them that are used."""

    x: Any
    y: Any
    rows: npt.NDArray[np.int64]


class Examples(NamedTuple):
    """A peer's examples."""

    trained_on: Part
    held_out: Part


class _Position:
    """The state of training between two batches, which a snapshot saves."""

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = variables
        self.epoch = self.done = self.passed = self.seen = 0
        self.total = 0.0

    def snapshot(self) -> Snapshot:
        arrays = {f"{n}": np.asarray(variable) for n, variable in enumerate(self.variables)}
        counts = {name: getattr(self, name) for name in ("epoch", "done", "passed", "seen")}
        return Snapshot(arrays, {**counts, "total": self.total})

    def restore(self, snapshot: Snapshot) -> None:
        for n, variable in enumerate(self.variables):
            variable.assign(snapshot.arrays[f"{n}"])
        for name in ("epoch", "done", "passed", "seen"):
            setattr(self, name, int(snapshot.values[name]))
        self.total = float(snapshot.values["total"])


class KerasLoop(task_settings.WithSettings):
    """A task whose subclass gives the model and the examples."""

    _known: Mapping[str, SettingSpec] = LOOP

    def __init__(self) -> None:
        self._data = DataSettings()
        self._model: tuple[dict[str, Setting], Any] | None = None
        self._examples: tuple[dict[str, Setting], Examples] | None = None
        self._at: _Position | None = None
        self._restored: Snapshot | None = None
        self._watch: Watch = lambda places: None

    # --- for subclasses to define ---

    def build(self, settings: RunSettings) -> Any:
        """A new `keras.Model`."""
        raise NotImplementedError

    def read(self, data: DataSettings, settings: RunSettings) -> Examples:
        """This peer's examples. Raises DataError."""
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> Any:
        """The mean loss of a batch: of classes the cross-entropy of logits, of numbers the squared
        error."""
        if target.dtype.is_integer:
            classes = tf.cast(target, tf.int64)
            return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(classes, output))
        same = tf.reshape(output, tf.shape(target))
        return tf.reduce_mean((same - tf.cast(target, output.dtype)) ** 2)

    def metrics(self, output: Any, target: Any) -> Mapping[str, Any]:
        """Means over a batch, beside the loss: of classes the "accuracy"."""
        if not target.dtype.is_integer:
            return {}
        return {"accuracy": (np.asarray(output).argmax(1) == np.asarray(target)).mean()}

    def make_optimizer(self, model: Any, settings: RunSettings) -> Any:
        """An optimizer as the settings say."""
        plan = self._plan(settings)
        if plan.optimiser == "adamw":
            return keras.optimizers.AdamW(plan.lr, weight_decay=plan.weight_decay, epsilon=1e-8)
        if plan.optimiser == "muon":
            raise UsageError("a Keras task has no optimiser=muon", "optimiser=adamw")
        return keras.optimizers.SGD(plan.lr, momentum=plan.momentum)

    def prepared(self, x: Any, settings: RunSettings, training: bool) -> Any:
        """A batch as the model takes it, of rows of `Examples.x`."""
        return x

    def to_keras(self, weights: Mapping[str, Array], settings: RunSettings) -> list[Array]:
        """Travelling tensors in the order and layout of `model.weights`."""
        return [weights[name] for name in _paths(self._built(settings))]

    def from_keras(self, arrays: Sequence[Array], settings: RunSettings) -> Weights:
        """The inverse of `to_keras`."""
        return Weights(dict(zip(_paths(self._built(settings)), arrays, strict=True)))

    # --- Task ---

    def setting_specs(self) -> Mapping[str, SettingSpec]:
        """All settings by name, with their types, bounds and help."""
        return task_settings.shareable(self._known)

    def schema(self, settings: RunSettings) -> Schema:
        return self._now(settings).schema

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """Weights from the initializers of the model."""
        keras.utils.set_random_seed(derive_seed("init", seed))
        self._model = None
        return self._now(settings)

    def load(self, data: DataSettings) -> None:
        """Store the data settings; examples are read when needed. Raises UsageError."""
        cards = tf.config.list_physical_devices("GPU")
        kind, _, number = data.device.partition(":")
        found = cards[int(number) :][:1] if number else cards
        if kind == "cpu" and cards:
            tf.config.set_visible_devices([], "GPU")
        elif kind not in ("auto", "cpu") and not found:
            raise UsageError(
                f"TensorFlow cannot use {data.device} on this machine",
                "commonweight-agent policy set device auto",
            )
        elif number:
            tf.config.set_visible_devices(found, "GPU")
        self._data, self._examples = data, None

    def count_examples(self, settings: RunSettings) -> tuple[int, int]:
        """How many examples `train` and `evaluate` use."""
        trained_on, held_out = self._found(settings)
        return len(trained_on.rows), len(held_out.rows)

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """SGD or AdamW on this peer's examples; the metric "loss" is the mean of the last epoch."""
        plan, model = self._plan(settings), self._loaded(weights, settings)
        examples = self._found(settings).trained_on
        optimiser = self.make_optimizer(model, settings)
        optimiser.build(model.trainable_variables)
        at = _Position([*model.variables, *optimiser.variables])
        keras.utils.set_random_seed(derive_seed("train", plan.seed, plan.round, self._data.index))
        if self._restored is not None:
            at.restore(self._restored)
        self._at, self._restored = at, None
        step, count = self._step(model, optimiser, plan), len(examples.rows)
        batch, steps = plan.batch_size or count, plan.steps(count)
        seed = derive_seed("order", plan.seed, plan.round, self._data.index)
        watch, self._watch = self._watch, lambda places: None
        try:
            while at.done < steps:
                places = np.random.RandomState(seed + at.epoch).permutation(count)
                body = count - plan.tail(count)
                ahead = at.passed + (steps - at.done) * batch
                watch(places[: count if ahead > body else ahead])
                order = examples.rows[places]
                starts = [
                    *range(at.passed, body, batch),
                    *([body] if at.passed <= body < count else []),
                ]
                for start in starts:
                    if at.done == steps:
                        break
                    rows = order[start : start + batch] if start < body else order[start:]
                    x = self.prepared(examples.x[rows], settings, True)
                    loss = run_or_suggest_batch_size(
                        partial(_step_of, step, x, examples.y[rows]), len(rows)
                    )
                    at.done += 1
                    at.passed += len(rows)
                    at.total += loss * len(rows)
                    on_step(at.done, steps, loss, at.seen + at.passed)
                if at.done < steps:
                    at.epoch, at.seen = at.epoch + 1, at.seen + at.passed
                    at.passed, at.total = 0, 0.0
        finally:
            self._at = None
        trained = self.from_keras([np.asarray(v) for v in model.weights], settings)
        return TrainOutcome(trained, count, {"loss": at.total / at.passed})

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """The means of "loss" and `metrics` over this peer's held-out examples."""
        model, examples = self._loaded(weights, settings), self._found(settings).held_out

        def measure(first: int) -> BatchResult:
            rows = examples.rows[first : first + EVALUATION_BATCH]
            x, y = self.prepared(examples.x[rows], settings, False), tf.constant(examples.y[rows])
            made = model(tf.constant(x), training=False)
            found = {"loss": self.loss(made, y), **self.metrics(made, y)}
            return BatchResult(len(rows), {n: float(v) * len(rows) for n, v in found.items()})

        batches = range(0, len(examples.rows), EVALUATION_BATCH)
        return evaluation.evaluate(batches, measure, on_step)

    def watch_epochs(self, watch: Watch) -> None:
        """Make the next `train` call this before each epoch, with the places of its examples."""
        self._watch = watch

    # --- Resumable ---

    def snapshot(self) -> Snapshot:
        """The state of `train`."""
        assert self._at is not None
        return self._at.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Make the next `train` resume from there."""
        self._restored = snapshot

    # --- helpers ---

    def merged(self, settings: RunSettings) -> dict[str, Setting]:
        """The settings over the defaults. Raises UnknownName, UsageError."""
        return resolve_settings(settings, self.defaults)

    def _plan(self, settings: RunSettings) -> Hyperparameters:
        plan = read_hyperparameters(settings, self.defaults)
        if plan.precision not in ("auto", "fp32"):
            raise UsageError("Keras tasks train in fp32", "precision=auto or precision=fp32")
        return plan

    def _built(self, settings: RunSettings) -> Any:
        merged = self.merged(settings)
        if self._model is None or self._model[0] != merged:
            keras.backend.clear_session()  # restarts the numbering of unnamed layers
            self._model = merged, self.build(settings)
        return self._model[1]

    def _loaded(self, weights: Mapping[str, Array], settings: RunSettings) -> Any:
        model = self._built(settings)
        arrays = self.to_keras(weights, settings)
        for variable, array in zip(model.weights, arrays, strict=True):
            variable.assign(array)
        return model

    def _now(self, settings: RunSettings) -> Weights:
        return self.from_keras([np.asarray(v) for v in self._built(settings).weights], settings)

    def _found(self, settings: RunSettings) -> Examples:
        merged = self.merged(settings)
        if self._examples is None or self._examples[0] != merged:
            self._examples = None
            self._examples = merged, self.read(self._data, settings)
        return self._examples[1]

    def _step(self, model: Any, optimiser: Any, plan: Hyperparameters) -> Any:
        """One step, in place; returns the batch's mean loss before it."""
        variables = model.trainable_variables
        origin = [tf.constant(v.value) for v in variables] if plan.proximal_mu else []

        @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = self.loss(model(x, training=True), y)
            gradients = tape.gradient(loss, [v.value for v in variables])
            if plan.proximal_mu:
                far = [v.value - first for v, first in zip(variables, origin, strict=True)]
                gradients = [g + plan.proximal_mu * d for g, d in zip(gradients, far, strict=True)]
            if plan.clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, plan.clip_norm)
            if plan.weight_decay and plan.optimiser == "sgd":  # added to the gradient, as in torch
                gradients = [
                    g + plan.weight_decay * v.value
                    for g, v in zip(gradients, variables, strict=True)
                ]
            optimiser.apply(gradients, variables)
            return loss

        return step


def _step_of(step: Any, x: Any, y: Any, size: int) -> float:
    """A step of the first `size` examples of a batch."""
    return float(step(tf.constant(x[:size]), tf.constant(y[:size])))


def _paths(model: Any) -> list[str]:
    """Names of the model's tensors, without the numbered name of the model itself. Raises
    TaskUnusable."""
    found = [variable.path.removeprefix(f"{model.name}/") for variable in model.weights]
    if len({*found}) < max(len(found), 1):
        raise TaskUnusable(
            "the model has no tensors yet, or two with the same name",
            "begin with keras.Input(shape), and give layers names of their own",
        )
    return found
