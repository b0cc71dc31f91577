"""The trainer's half of SCAFFOLD, FedBN and DiLoCo: what is this peer's own in a run. Pure.

Of a version, the task sees the model alone; what stays at home, this peer's control variate and its
optimiser lie in a file of its own, which moves on with each update.

SCAFFOLD: Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1. Each step's gradient is corrected
by c - c_i, the update carries c + (c_i⁺ - c_i), and c_i⁺ is either (I) the gradient at the version
or (II) the mean of the gradients on the way, c_i - c + (x - y) / path. As (II) follows from the
weights and the path alone, the coordinator can add it up itself: with option 3 it does.
FedBN: Li et al. 2021, arXiv 2102.07623. DiLoCo: Douillard et al. 2023, arXiv 2311.08105.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from agent.tasks import Continuing, Settings, Steerable, Task
from protocols.errors import BadWeights, UsageFault
from protocols.model import personalization, weights
from protocols.model.personalization import control_of, pick
from protocols.model.weights import Array, Schema, Weights

#: Begins the names of the optimiser's arrays in the file.
_OPTIMISER = "optimiser:"

Arrays = dict[str, Array]
Floats = npt.NDArray[np.floating[Any]]


class Personal:
    """This peer's own part of a model of schema `model`, under the scheme in the settings.

    `first` makes the task's first weights: what stays at home begins with them. `kept` is the file
    of earlier updates, if there is one. `optimiser` is that of the update before.
    """

    def __init__(
        self, model: Schema, scheme: Settings, first: Callable[[], Weights], kept: Path | None
    ) -> None:
        self._model, self._scheme = model, scheme
        self.shared = personalization.shared(model, scheme)
        at_home = {name: spec for name, spec in model.items() if name not in self.shared}
        controls = {n: s for n, s in self.shared.items() if personalization.is_control(n)}
        self._schema = at_home | controls
        fresh = first() if at_home else Weights({})
        self._newcomers: Arrays = {name: fresh[name] for name in at_home}
        none = {name: np.zeros(s.shape, weights.DTYPES[s.dtype]) for name, s in controls.items()}
        self.optimiser: Arrays = {}
        found = self._read(kept)
        self._own: Mapping[str, Array] = {**self._newcomers, **none} if found is None else found

    def _read(self, kept: Path | None) -> Weights | None:
        if kept is None or not kept.exists():
            return None
        try:
            whole = weights.load(kept)
            names = [name for name in whole if not name.startswith(_OPTIMISER)]
            found = pick({name: whole.schema[name] for name in names}, whole.__getitem__)
            weights.check_schema(found.schema, self._schema)
        except BadWeights as err:
            sys.stderr.write(f"what this peer kept for itself is dropped: {err.message}\n")
            return None
        self.optimiser = {
            name.removeprefix(_OPTIMISER): whole[name] for name in whole if name not in names
        }
        return found

    def model(self, version: Weights, *, newcomer: bool = False) -> Weights:
        """The task's model: what is shared, and this peer's own (or a newcomer's) beside it."""
        at_home = self._newcomers if newcomer else self._own
        return pick(self._model, lambda n: version[n] if n in self.shared else at_home[n])

    @property
    def stays_at_home(self) -> bool:
        return bool(self._newcomers)

    @property
    def steers(self) -> bool:
        return bool(self._scheme.get(personalization.SCAFFOLD))

    @property
    def tells_path(self) -> bool:
        """The coordinator makes the control variates of the weights and of how far they went."""
        return self._scheme.get(personalization.SCAFFOLD) == 3

    @property
    def continues(self) -> bool:
        return bool(self._scheme.get(personalization.KEEP_OPTIMISER))

    def correction(self, version: Weights) -> Arrays:
        """c - c_i, by the weight whose gradient it is added to."""
        return {
            name: np.subtract(version[control], self._own[control])
            for name, control in self._controlled()
        }

    def update(
        self,
        task: Task,
        settings: Settings,
        version: Weights,
        trained: Mapping[str, Array],
        out: Path | None,
    ) -> Weights:
        """What travels of a trained model; what does not is written to `out`. Raises UsageFault."""
        own = {name: trained[name] for name in self._newcomers}
        change: dict[str, Floats] = {}
        if self.steers:
            new = self._control(steerable(task), settings, version, trained)
            if not self.tells_path:
                change = {n: _floats(version[n]) + (new[n] - _floats(self._own[n])) for n in new}
            own |= new
        if out is not None:
            kept = pick(self._schema, own.__getitem__)
            if self.continues:
                left = continuing(task).remembered()
                kept = Weights({**kept, **{_OPTIMISER + name: left[name] for name in left}})
            weights.save(kept, out)
        travels = {**version, **trained, **change}
        return pick(self.shared, travels.__getitem__)

    def _controlled(self) -> list[tuple[str, str]]:
        """The model's tensors that have control variates, and the names of those."""
        named = [(name, control_of(name, self._scheme)) for name in self._model]
        return [(name, control) for name, control in named if control in self._schema]

    def _control(
        self, task: Steerable, settings: Settings, version: Weights, trained: Mapping[str, Array]
    ) -> dict[str, Floats]:
        """c_i⁺ by the names of control variates."""
        moving = [
            (name, control, _floats(self._own[control])) for name, control in self._controlled()
        ]
        if self._scheme[personalization.SCAFFOLD] == 1:
            gradient = task.gradient(self.model(version), settings)
            # What no gradient moves (running statistics) needs no control.
            return {n: np.asarray(gradient.get(name, own), own.dtype) for name, n, own in moving}
        path = task.path(settings)
        return {
            n: (own - _floats(version[n]) + moved / path).astype(own.dtype)
            for name, n, own in moving
            for moved in [self._moved(name, version, trained)]
        }

    def _moved(self, name: str, version: Weights, trained: Mapping[str, Array]) -> Floats:
        """x - y as float64."""
        x, y = version[name], trained[name]
        if self._model[name].dtype == "BF16":
            x, y = weights.widen(x), weights.widen(y)
        return np.subtract(x, y, dtype=np.float64)


def _floats(array: Array) -> Floats:
    return cast(Floats, array)


def continuing(task: Task) -> Continuing:
    """The task, if its optimiser can go on from round to round. Raises UsageFault."""
    if not isinstance(task, Continuing):
        raise UsageFault(
            f"{type(task).__name__} cannot keep its optimiser: it lacks recall or remembered",
            "--strategy-arg keep_optimiser=false, or these methods: see agent/tasks",
        )
    return task


def steerable(task: Task) -> Steerable:
    """The task, if SCAFFOLD can steer it. Raises UsageFault."""
    if not isinstance(task, Steerable):
        raise UsageFault(
            f"{type(task).__name__} cannot be trained with SCAFFOLD: it lacks steer, path or "
            "gradient",
            "another strategy, or these methods: see agent/tasks",
        )
    return task
