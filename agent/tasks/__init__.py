"""Tasks: model, data loading and local training behind one small protocol, and where to find them.

A task is any class with the methods of `Task`; its file need not import this one. Built-in tasks
are found by name; others by an entry point of the group `commonweight.tasks` that names the class:

    [project.entry-points."commonweight.tasks"]
    gait = "my_package.gait:Gait"

Importing this module imports no task: that happens in the trainer's process only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy.typing as npt
from msgspec import Struct

from protocols.errors import CommonweightError, UnknownName, UsageFault
from protocols.weights import Array, Schema, Weights

GROUP = "commonweight.tasks"
BUILT_IN: dict[str, str] = {
    "mnist": "agent.tasks.mnist:Mnist",
    "ping": "agent.tasks.ping:Ping",
}

Setting = str | int | float | bool
Settings = Mapping[str, Setting]

#: `on_step(step, steps, loss, examples_done)`, to be called after every batch. It may block (a
#: pause) or raise `Cancelled`, which a task lets pass.
OnStep = Callable[[int, int, float, int], None]

#: Settings that the caller of `train` adds to every task's own.
RESERVED = frozenset({"seed", "round"})


class Cancelled(BaseException):
    """The work is not wanted any more. No `Exception`, so that a task's own `except` lets it by."""


class DataSettings(Struct, frozen=True, kw_only=True):
    """Which data a peer holds: its own (`path`), or part `index` of `parts` of a shared set.

    `split` says how a shared set is cut: "iid" at random, "shards" so that a part sees few labels.
    `cache` is a folder in which a task may keep what it made of the data; empty: nowhere.
    `device` is where the data lie and are trained on (see `devices`), and with `compile` the task
    may let torch compile its model.
    """

    index: int = 0
    parts: int = 1
    split: Literal["iid", "shards"] = "iid"
    seed: int = 0
    path: str = ""
    cache: str = ""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool = False


class TrainOutcome(NamedTuple):
    """Trained weights, the number of examples they saw, and metrics (NaN where diverged)."""

    weights: Mapping[str, Array]
    num_examples: int
    metrics: Mapping[str, float]


class EvalOutcome(NamedTuple):
    """The number of held-out examples and metrics over them, such as "loss" and "accuracy"."""

    num_examples: int
    metrics: Mapping[str, float]


class Snapshot(NamedTuple):
    """All that training needs to go on between two batches, beside data, settings and chance.

    Weights, optimiser state and where in the data it is; arrays of any dtype but objects.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    values: Mapping[str, int | float | str]


@runtime_checkable
class Task(Protocol):
    """What a task can do. Made without arguments; used by one thread.

    `train` and `evaluate` must not write to the tensors they are given, and are called after
    `load`. Plain tuples do for the outcomes, and any mapping of numpy arrays for the weights.
    """

    def schema(self, settings: Settings) -> Schema:
        """Names, dtypes and shapes of the model's tensors. Raises UnknownName, UsageFault."""

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


def names() -> list[str]:
    """Every task that this machine can run, sorted. Imports none of them."""
    return sorted({*BUILT_IN, *entry_points(group=GROUP).names})


def find(name: str) -> Task:
    """A new task of this name. Raises UnknownName, or CommonweightError if it cannot be loaded."""
    try:
        if name in BUILT_IN:
            module, _, attribute = BUILT_IN[name].partition(":")
            made = getattr(import_module(module), attribute)()
        elif found := tuple(entry_points(group=GROUP, name=name)):
            made = found[0].load()()
        else:
            raise UnknownName(
                f"this machine has no task {name!r}",
                f"tasks here: {', '.join(names())}; others are installed as Python packages",
            )
    except (ImportError, AttributeError) as err:
        raise CommonweightError(
            f"the task {name!r} cannot be loaded: {err}",
            "install what it needs; for built-in tasks: pip install 'commonweight[demo]'",
        ) from err
    if not isinstance(made, Task):
        raise CommonweightError(
            f"{type(made).__name__} is no task: it lacks schema, init, load, train or evaluate"
        )
    return made


def checked(settings: Settings, defaults: Settings) -> dict[str, Setting]:
    """`defaults` overlaid with `settings`, each of its default's type; text is parsed.

    Raises UnknownName for a setting that has no default, UsageFault for one of a wrong type.
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
    raise UsageFault(f"the setting {name} cannot be {value!r}", f"such as {name}={default}")
