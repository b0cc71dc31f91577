"""The trainer's part of SCAFFOLD, FedBN and DiLoCo: this peer's own state in a run.

A task sees only the model. A file of this peer holds local layers, control variates and optimizer
state, and each update writes a new one. Each algorithm is a hook around the training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from agent.tasks import Settings, Task
from agent.tasks.capabilities import KeepsOptimizerState, SupportsScaffold
from protocols.errors import BadWeights, UsageError
from protocols.model import personalization, weights
from protocols.model.bfloat16 import difference
from protocols.model.personalization import build_weights, control_name
from protocols.model.weights import Array, Schema, Weights

#: Prefix of the optimizer's arrays in the file.
_OPTIMIZER_PREFIX = "optimiser:"

Arrays = dict[str, Array]
Floats = npt.NDArray[np.floating[Any]]


@dataclass
class Training:
    """One training of `task`: its inputs, its results, and what hooks add.

    The task trains `model`, and `trained` is the result. `sent` replaces tensors of the update;
    `local` and `optimizer_state` go to this peer's file.
    """

    task: Task
    settings: Settings
    version: Weights
    model: Weights
    trained: Mapping[str, Array] = field(default_factory=dict)
    sent: Arrays = field(default_factory=dict)
    local: Arrays = field(default_factory=dict)
    optimizer_state: Mapping[str, Array] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Hook(Protocol):
    """Runs before and after training. Both methods raise UsageError."""

    def before_train(self, training: Training) -> None: ...

    def after_train(self, training: Training) -> None: ...


class FedBN:
    """Keeps some layers on this machine (Li et al. 2021, arXiv 2102.07623)."""

    def __init__(self, local_layers: frozenset[str]) -> None:
        self._local_layers = local_layers

    def before_train(self, training: Training) -> None:
        """Does nothing: the model already has this peer's layers."""

    def after_train(self, training: Training) -> None:
        training.local |= {name: training.trained[name] for name in self._local_layers}


class Scaffold:
    """Corrects each step's gradient by c - c_i (Karimireddy et al. 2020, arXiv 1910.06378,
    algorithm 1).

    The update carries c + (c_i⁺ - c_i), where c_i⁺ is either (option 1) the gradient at the version
    or (2) the mean of the gradients on the way, c_i - c + (x - y) / path. As (2) follows from the
    weights and the path alone, the coordinator can add it up itself: with option 3 it does, from
    the metric "path".

    `controls` names the control variate of each tensor of the model, and `own` holds c_i by those
    names.
    """

    def __init__(self, option: int, controls: Mapping[str, str], own: Mapping[str, Array]) -> None:
        self._option, self._controls, self._own = option, controls, own

    def before_train(self, training: Training) -> None:
        task = _require_scaffold(training.task)
        task.lr_times_steps(training.settings)  # raises now, not after an hour of training
        task.steer(
            {
                name: np.subtract(training.version[control], self._own[control])
                for name, control in self._controls.items()
            }
        )

    def after_train(self, training: Training) -> None:
        new = self._new_controls(_require_scaffold(training.task), training)
        training.local |= new
        if self._option == 3:
            training.metrics[personalization.LR_TIMES_STEPS] = _require_scaffold(
                training.task
            ).lr_times_steps(training.settings)
            return
        training.sent |= {
            control: _floats(training.version[control]) + (c - _floats(self._own[control]))
            for control, c in new.items()
        }

    def _new_controls(self, task: SupportsScaffold, training: Training) -> dict[str, Floats]:
        """c_i⁺ by the names of control variates."""
        moving = [
            (name, control, _floats(self._own[control])) for name, control in self._controls.items()
        ]
        if self._option == 1:
            gradient = task.gradient(training.model, training.settings)
            # Tensors without a gradient (running statistics) need no control variate.
            return {n: np.asarray(gradient.get(name, own), own.dtype) for name, n, own in moving}
        path = task.lr_times_steps(training.settings)
        version = training.version
        return {
            n: (own - _floats(version[n]) + _movement(training, name) / path).astype(own.dtype)
            for name, n, own in moving
        }


class DiLoCo:
    """Keeps the optimizer state between rounds (Douillard et al. 2023, arXiv 2311.08105)."""

    def __init__(self, optimizer_state: Mapping[str, Array]) -> None:
        self._optimizer_state = optimizer_state

    def before_train(self, training: Training) -> None:
        _require_optimizer_state(training.task).load_optimizer_state(self._optimizer_state)

    def after_train(self, training: Training) -> None:
        training.optimizer_state = _require_optimizer_state(training.task).optimizer_state()


class Personalization:
    """This peer's own part of a model with the schema `model`, as the `scheme` settings say.

    `first` makes the task's first weights, with which local layers start. `kept` is the file that
    the last update wrote, if there is one.
    """

    def __init__(
        self, model: Schema, scheme: Settings, first: Callable[[], Weights], kept: Path | None
    ) -> None:
        self._model = model
        self.shared = personalization.shared_schema(model, scheme)
        local_layers = {name: spec for name, spec in model.items() if name not in self.shared}
        controls = {n: s for n, s in self.shared.items() if personalization.is_control(n)}
        self._schema = local_layers | controls
        fresh = first() if local_layers else Weights({})
        self._newcomers: Arrays = {name: fresh[name] for name in local_layers}
        none = {name: np.zeros(s.shape, weights.DTYPES[s.dtype]) for name, s in controls.items()}
        found, optimizer_state = self._read(kept)
        self._own: Mapping[str, Array] = {**self._newcomers, **none} if found is None else found
        self._hooks: list[Hook] = [FedBN(frozenset(local_layers))]
        if option := scheme.get(personalization.SCAFFOLD):
            named = {name: control_name(name, scheme) for name in model}
            steered = {name: control for name, control in named.items() if control in controls}
            self._hooks.append(Scaffold(int(option), steered, self._own))
        if scheme.get(personalization.KEEP_OPTIMIZER):
            self._hooks.append(DiLoCo(optimizer_state))

    def _read(self, kept: Path | None) -> tuple[Weights | None, Arrays]:
        """This peer's tensors and its optimizer state."""
        if kept is None or not kept.exists():
            return None, {}
        try:
            whole = weights.load(kept)
            # An evaluation has no use for control variates, which are in the file too.
            names = [name for name in self._schema if name in whole]
            found = build_weights({name: whole.schema[name] for name in names}, whole.__getitem__)
            weights.check_schema(found.schema, self._schema)
        except BadWeights as err:
            sys.stderr.write(f"the personal state of this peer is ignored: {err.message}\n")
            return None, {}
        return found, {
            name.removeprefix(_OPTIMIZER_PREFIX): whole[name]
            for name in whole
            if name.startswith(_OPTIMIZER_PREFIX)
        }

    @property
    def has_local_layers(self) -> bool:
        """True if some layers stay on this machine."""
        return bool(self._newcomers)

    def model(self, version: Weights, *, newcomer: bool = False) -> Weights:
        """The task's model: shared layers, and the local ones of this peer or of a newcomer."""
        local_layers = self._newcomers if newcomer else self._own
        return build_weights(
            self._model, lambda n: version[n] if n in self.shared else local_layers[n]
        )

    def before_train(self, task: Task, settings: Settings, version: Weights) -> Training:
        """Prepare the task for training `Training.model`. Raises UsageError."""
        training = Training(task, settings, version, self.model(version))
        for hook in self._hooks:
            hook.before_train(training)
        return training

    def after_train(
        self, training: Training, trained: Mapping[str, Array], out: Path | None
    ) -> Weights:
        """The update. Writes local state to `out`. Raises UsageError."""
        training.trained = trained
        for hook in self._hooks:
            hook.after_train(training)
        if out is not None:
            kept = build_weights(self._schema, training.local.__getitem__)
            state = {
                _OPTIMIZER_PREFIX + name: array for name, array in training.optimizer_state.items()
            }
            weights.save(Weights({**kept, **state}, weights.bf16_names(kept.schema)), out)
        whole = {**training.version, **trained, **training.sent}
        return build_weights(self.shared, whole.__getitem__)


def _movement(training: Training, name: str) -> Floats:
    """x - y as float64, the movement of a tensor in training."""
    dtype = training.model.schema[name].dtype
    return difference(training.version[name], training.trained[name], dtype)


def _floats(array: Array) -> Floats:
    return cast(Floats, array)


def _require_optimizer_state(task: Task) -> KeepsOptimizerState:
    """The task, if it can keep its optimizer state. Raises UsageError."""
    if not isinstance(task, KeepsOptimizerState):
        raise UsageError(
            f"{type(task).__name__} cannot keep its optimizer: it has no load_optimizer_state or "
            "no optimizer_state method",
            "--strategy-arg keep_optimiser=false, or these methods: see agent/tasks",
        )
    return task


def _require_scaffold(task: Task) -> SupportsScaffold:
    """The task, if it supports SCAFFOLD. Raises UsageError."""
    if not isinstance(task, SupportsScaffold):
        raise UsageError(
            f"{type(task).__name__} cannot be trained with SCAFFOLD: it has no steer, "
            "lr_times_steps or gradient method",
            "another strategy, or these methods: see agent/tasks",
        )
    return task
