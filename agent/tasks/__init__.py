"""Tasks: model, data loading and local training behind one small protocol.

A task is any class with the methods of `Task`; its file need not import this one (docs/tasks.md
has an example). Where a task is found: `agent.tasks.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy.typing as npt

from agent.data.settings import DataSettings as DataSettings
from protocols.errors import UnknownName, UsageError
from protocols.model.weights import Array, Schema, Weights
from protocols.tables.evaluation_counts import Tallies
from protocols.tables.statistics import TableStatistics

Setting = str | int | float | bool
Settings = Mapping[str, Setting]

#: `on_step(step, steps, loss, examples_done)`, to be called after every batch. It may block (a
#: pause) or raise `Cancelled`, which a task lets pass.
OnStep = Callable[[int, int, float, int], None]

#: Settings that the caller adds to every task's own. "preprocessing" is what the peers agreed on
#: from their surveys, as text.
RESERVED = frozenset({"seed", "round", "preprocessing"})


class Cancelled(BaseException):
    """The work is not wanted any more. No `Exception`, so that a task's own `except` lets it by."""


class TrainOutcome(NamedTuple):
    """Trained weights, the number of examples they saw, and metrics (NaN where diverged)."""

    weights: Mapping[str, Array]
    num_examples: int
    metrics: Mapping[str, float]


class EvalOutcome(NamedTuple):
    """The number of held-out examples and metrics over them, such as "loss" and "accuracy".

    `tallies` (which may be left out) are what is added up over peers: see
    `protocols.tables.evaluation_counts`.
    """

    num_examples: int
    metrics: Mapping[str, float]
    tallies: Tallies = MappingProxyType({})


class Snapshot(NamedTuple):
    """All that training needs to go on between two batches, beside data, settings and chance.

    Weights, optimiser state and where in the data it is; arrays of any dtype but objects.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    values: Mapping[str, int | float | str]


@runtime_checkable
class Task(Protocol):
    """What a task can do. Made without arguments; used by one thread.

    In the trainer `load` is called before all else. `train` and `evaluate` must not write to the
    tensors they are given. Plain tuples do for the outcomes, and any mapping of numpy arrays for
    the weights. An attribute `version` (text), if there is one, must be the same on all peers.
    """

    def schema(self, settings: Settings) -> Schema:
        """Names, dtypes and shapes of the model's tensors. Raises UnknownName, UsageError."""

    def init(self, seed: int, settings: Settings) -> Weights:
        """First weights; the same seed and settings give the same bytes."""

    def load(self, data: DataSettings) -> None:
        """Bring this peer's data into memory. Raises CommonweightError."""

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        """Train on this peer's data. `settings` also hold the run's "seed" and the "round"."""

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        """Measure `weights` on this peer's held-out data."""


@runtime_checkable
class Resumable(Protocol):
    """What a task may do besides: go on with training that was cut off by a kill or a power cut.

    The generators of Python, numpy and torch are kept for it; only those of its own are its affair.
    """

    def snapshot(self) -> Snapshot:
        """The present state of `train`. Called from within `on_step`; may give views."""

    def restore(self, snapshot: Snapshot) -> None:
        """Let the next `train`, of the same weights, settings and data, go on from here."""


@runtime_checkable
class ProvidesStatistics(Protocol):
    """What a task may do besides: tell statistics from which follows what all peers share.

    They are merged by the coordinator; what it makes of them (`protocols.tables.preprocessing`)
    comes with all later settings as "preprocessing". Until then nothing but `load` and `survey` is
    called.
    """

    def survey(self, settings: Settings) -> TableStatistics:
        """Mergeable statistics, no rows. Called after `load`. Raises DataError."""


@runtime_checkable
class HasMetadata(Protocol):
    """What a task may do besides: say what else but tensors its peers must have alike."""

    def traits(self, settings: Settings) -> Mapping[str, Sequence[str] | str]:
        """Lists of words by field: "features", "classes", "preprocessing" and the like.

        Called after `load`. They are compared before round 1; a peer that differs is told which
        field, and the others go on. They leave the machine.
        """


@runtime_checkable
class SupportsScaffold(Protocol):
    """What a task may do besides: let SCAFFOLD steer its plain SGD (arXiv 1910.06378).

    Arrays are by the names of the weights, and as large as these.
    """

    def steer(self, correction: Mapping[str, Array]) -> None:
        """Let the next `train` add this to the gradient of each of its steps."""

    def lr_times_steps(self, settings: Settings) -> float:
        """Learning rate times steps of a `train` with these settings on this peer's data.

        Raises UsageError where its steps would be no plain SGD.
        """

    def gradient(self, weights: Weights, settings: Settings) -> Mapping[str, Array]:
        """The gradient of the mean loss over all of this peer's examples."""


@runtime_checkable
class KeepsOptimizerState(Protocol):
    """What a task may do besides: go on in each round with the optimiser of the one before."""

    def load_optimizer_state(self, state: Mapping[str, Array]) -> None:
        """Start the next `train` with this state; an empty mapping means a new optimizer."""

    def optimizer_state(self) -> Mapping[str, Array]:
        """The state of the optimizer after the last `train`, for `load_optimizer_state`."""


@runtime_checkable
class Predicting(Protocol):
    """What a task may do besides: answer from the shared model, on this machine."""

    def predict(
        self, weights: Weights, settings: Settings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any] | npt.NDArray[Any]]]:
        """Answers for the file, folder or text `source`, batch by batch: columns of one length.

        `load` was called before if the owner has set data or a folder of base models. Raises
        CommonweightError.
        """


@runtime_checkable
class Exporting(Protocol):
    """What a task may do besides: write a model in a form for other programs."""

    @property
    def forms(self) -> Sequence[str]:
        """Their names, such as "onnx"."""

    def export(
        self, weights: Weights, settings: Settings, form: str, data: DataSettings, out: Path
    ) -> None:
        """Write the model to `out`, a file or a folder that is not there yet.

        `load` was called before if the owner has set data. Raises CommonweightError.
        """


def merge_settings(settings: Settings, defaults: Settings) -> dict[str, Setting]:
    """`defaults` overlaid with `settings`, each of its default's type; text is parsed.

    Raises UnknownName for a setting that has no default, UsageError for one of a wrong type.
    """
    merged = dict(defaults)
    for name, value in settings.items():
        if name in defaults:
            merged[name] = _of_type(name, value, defaults[name])
        elif name not in RESERVED:
            raise UnknownName(
                f"the task has no setting {name!r}", f"its settings: {', '.join(sorted(defaults))}"
            )
    return merged


def _of_type(name: str, value: Setting, default: Setting) -> Setting:
    kind = type(default)
    try:
        if isinstance(value, str) and kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if isinstance(value, str) or (kind is float and type(value) is int):
            return kind(value)
    except (ValueError, KeyError, OverflowError):
        pass  # told below, like every other value that does not fit
    else:
        if type(value) is kind:
            return value
    raise UsageError(f"the setting {name} cannot be {value!r}", f"such as {name}={default}")
