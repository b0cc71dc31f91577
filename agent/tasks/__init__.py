"""Tasks: model, data loading and local training behind one small protocol.

A task is any class with the methods of `Task`; its file need not import this one (docs/tasks.md
has an example). What else it may be able to do: `agent.tasks.capabilities`. Where a task is found:
`agent.tasks.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import numpy as np
import numpy.typing as npt

from agent.data.settings import DataSettings as DataSettings
from protocols.errors import UnknownName
from protocols.model import setting_specs
from protocols.model.weights import Array, Schema, Weights
from protocols.tables.evaluation_counts import Tallies

Setting = str | int | float | bool
Settings = Mapping[str, Setting]

#: `on_step(step, steps, loss, examples_done)`: a task calls it after every batch. It may block (a
#: pause) or raise `Cancelled`, which a task must not catch. The loss may be a tensor on a graphics
#: card: `float(loss)` waits for the step.
OnStep = Callable[[int, int, SupportsFloat, int], None]

#: Gets the places of the examples of an epoch, int64[n].
Watch = Callable[[npt.NDArray[np.int64]], None]

#: Settings that the caller adds to those of a task. "preprocessing" is the preprocessing of all
#: peers, as text; "min_batch" the owner's minimum rows of a step; "masked" says that the update
#: leaves in a secure sum alone.
RESERVED = setting_specs.RESERVED


class Cancelled(BaseException):
    """The work was cancelled. Not an `Exception`, so that `except Exception` does not catch it."""


class TrainOutcome(NamedTuple):
    """Trained weights, the number of examples they saw, and metrics (NaN where diverged)."""

    weights: Mapping[str, Array]
    num_examples: int
    metrics: Mapping[str, float]


class EvalOutcome(NamedTuple):
    """The number of held-out examples and metrics over them, such as "loss" and "accuracy".

    `tallies` (optional) are counts that are summed over peers: see
    `protocols.tables.evaluation_counts`.
    """

    num_examples: int
    metrics: Mapping[str, float]
    tallies: Tallies = MappingProxyType({})


class Snapshot(NamedTuple):
    """What training needs to resume between two batches, beside data, settings and RNG state.

    Weights, optimizer state and the position in the data; arrays of any dtype except objects.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    values: Mapping[str, int | float | str]


@runtime_checkable
class Task(Protocol):
    """The methods of a task. Its class is called without arguments; one thread uses it.

    The trainer calls `load` first. `train` and `evaluate` must not write to the tensors that they
    get. Outcomes may be plain tuples, and weights any mapping of numpy arrays. An optional
    attribute `version` (text) must be the same on all peers.
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


def merge_settings(settings: Settings, defaults: Settings) -> dict[str, Setting]:
    """`defaults` updated with `settings`; each value gets the type of its default, text is parsed.

    Raises UnknownName for a setting that has no default, UsageError for one of a wrong type.
    """
    merged = dict(defaults)
    for name, value in settings.items():
        if name in defaults:
            merged[name] = setting_specs.of_type(name, value, defaults[name])
        elif name not in RESERVED:
            raise UnknownName(
                f"the task has no setting {name!r}", f"its settings: {', '.join(sorted(defaults))}"
            )
    return merged
