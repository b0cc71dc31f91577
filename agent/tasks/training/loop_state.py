"""The state of training between two batches, which snapshots save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agent.tasks import Snapshot
from agent.tasks.training import precision
from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.seeds import derive_seed
from protocols.errors import UsageError
from protocols.model.weights import Array, Weights

Tensors = dict[str, Tensor]

#: Before the slot of an optimizer's number that is no tensor, in snapshots.
_NUMBER = "="
#: Before the names of the values of a scaler, in snapshots.
_SCALER = "scaler "


class LoopState:
    """Training between two batches.

    `weights` and the optimizer's `state` (tensors by slot and weight, with torch's names) change in
    place. `trained` are the names of weights with gradients; the model itself updates the others
    (integers, running statistics), or nothing does. `done` counts steps, `passed` the examples of
    this epoch, `seen` those of earlier epochs; `total` is the sum of this epoch's losses. `origin`
    holds the first weights for the proximal term, `correction` what is added to each gradient. A
    snapshot omits both, because the inputs of the training have them. `optimizer`: the task's own,
    which then holds its state. `scaler` scales the loss if the precision is fp16.
    """

    def __init__(
        self,
        weights: Mapping[str, Array] | Tensors,
        plan: Hyperparameters,
        device: torch.device,
        part: int,
        fixed: frozenset[str],
        correction: Mapping[str, Array],
    ) -> None:
        self.weights = {
            name: value if isinstance(value, Tensor) else torch.tensor(value, device=device)
            for name, value in weights.items()
        }
        self.trained = [
            name for name, t in self.weights.items() if t.is_floating_point() and name not in fixed
        ]
        self.state = {slot: self._zeros(slot) for slot in _slots(plan)}
        dtypes = {self.weights[name].dtype for name in self.trained}
        self.scaler = precision.make_scaler(plan.precision, device, dtypes)
        self.optimizer: torch.optim.Optimizer | None = None
        self._kept: Mapping[str, Array] = {}  # the state for an optimizer of the task's own
        self.origin: Tensors = {}
        if plan.proximal_mu:
            self.origin = {name: self.weights[name].detach().clone() for name in self.trained}
        self.correction = {
            name: torch.tensor(array, device=device) for name, array in correction.items()
        }
        order = derive_seed("order", plan.seed, plan.round, part)
        self._order = torch.Generator().manual_seed(order)
        self._epoch_began = self._order.get_state()
        self.done = self.passed = self.seen = 0
        self.total: float | Tensor = 0.0  # float64[] on a graphics card

    def pull_to(self, version: Mapping[str, Array]) -> None:
        """Take these weights as `origin`, if there is a proximal term."""
        if version and self.origin:
            self.origin = {
                name: torch.tensor(version[name], device=old.device)
                for name, old in self.origin.items()
            }

    def _zeros(self, slot: str) -> Tensors:
        if slot == "step":  # torch counts on the CPU, for each weight
            return {name: torch.zeros(()) for name in self.trained}
        return {name: torch.zeros_like(self.weights[name]) for name in self.trained}

    def permutation(self, examples: int) -> Tensor:
        """The order of the present epoch."""
        self._order.set_state(self._epoch_began)
        return torch.randperm(examples, generator=self._order)

    def next_epoch(self) -> None:
        self._epoch_began = self._order.get_state()
        self.seen += self.passed
        self.passed, self.total = 0, 0.0

    def use_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with an optimizer of the task's own, in the state that was kept."""
        self.optimizer, self.state = optimizer, {}
        names = self._names(optimizer)
        entries: dict[str, dict[str, Any]] = {}
        for key, array in self._kept.items():
            slot, _, name = key.partition(" ")
            number = slot.startswith(_NUMBER)
            value = array.item() if number else torch.tensor(array)
            entries.setdefault(name, {})[slot.removeprefix(_NUMBER)] = value
        known = {name: place for place, name in enumerate(names)}
        state = {known[name]: slots for name, slots in entries.items() if name in known}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The names of an optimizer's parameters in its order. Raises UsageError."""
        by_id = {id(tensor): name for name, tensor in self.weights.items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(parameter) not in by_id for parameter in parameters):
            raise UsageError(
                "the optimizer has a parameter that is not one of the model",
                "make it from model.parameters(), of the model that `optimizer` gets",
            )
        return [by_id[id(parameter)] for parameter in parameters]

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's state as arrays by "slot weight". Raises UsageError."""
        if self.optimizer is None:
            return _as_arrays(self.state)
        names, arrays = self._names(self.optimizer), dict[str, Array]()
        for place, slots in self.optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                if isinstance(value, bool | int | float):
                    arrays[f"{_NUMBER}{slot} {names[place]}"] = torch.tensor(value).numpy()
                elif isinstance(value, Tensor):
                    arrays |= _as_arrays({slot: {names[place]: value}})
                elif value is not None:
                    raise UsageError(
                        f"{type(self.optimizer).__name__} keeps a {type(value).__name__} as "
                        f"{slot!r}, which cannot be saved",
                        "an optimizer that keeps tensors and numbers",
                    )
        return arrays

    def load_optimizer_state(self, optimiser: Mapping[str, Array]) -> None:
        """Use this optimizer state, if it has the slots and shapes of this optimizer."""
        self._kept = optimiser
        mine = {
            f"{s} {name}": t for s, tensors in self.state.items() for name, t in tensors.items()
        }
        if {key: tensor.shape for key, tensor in mine.items()} == {
            key: array.shape for key, array in optimiser.items()
        }:
            for key, tensor in mine.items():
                tensor.copy_(torch.tensor(optimiser[key]))

    def snapshot(self) -> Snapshot:
        arrays = {**_as_arrays({"weight": self.weights}), **self.optimizer_state()}
        arrays["order"] = self._epoch_began.numpy()
        counts = {"done": self.done, "passed": self.passed, "seen": self.seen}
        scaling = {f"{_SCALER}{name}": v for name, v in self.scaler.state_dict().items()}
        return Snapshot(arrays, {**counts, "total": float(self.total), **scaling})

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Continue from there. Comes before `use_optimizer`."""
        arrays, values = snapshot
        for name, tensor in self.weights.items():
            tensor.copy_(torch.tensor(arrays[f"weight {name}"]))
        self.load_optimizer_state(
            {
                key: array
                for key, array in arrays.items()
                if key != "order" and not key.startswith("weight ")
            }
        )
        self._epoch_began = torch.tensor(arrays["order"])
        self.done, self.passed, self.seen = (int(values[n]) for n in ("done", "passed", "seen"))
        self.total = float(values["total"])
        scaling = {n.removeprefix(_SCALER): v for n, v in values.items() if n.startswith(_SCALER)}
        if scaling:
            self.scaler.load_state_dict(scaling)


def _as_arrays(slots: Mapping[str, Tensors]) -> dict[str, Array]:
    """Tensors by slot and weight as arrays by "slot weight"; bfloat16 as float32, which is exact.

    An optimizer's slot is not called "weight"."""
    return {
        f"{slot} {name}": (t.float() if t.dtype == torch.bfloat16 else t).detach().cpu().numpy()
        for slot, tensors in slots.items()
        for name, t in tensors.items()
    }


def as_weights(tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors as weights, without a copy if they are on the CPU."""
    arrays, bf16 = {}, []
    for name, tensor in tensors.items():
        bits = tensor.detach().cpu()
        if bits.dtype == torch.bfloat16:
            bits = bits.view(torch.uint16)
            bf16.append(name)
        arrays[name] = bits.numpy()
    return Weights(arrays, bf16)


def _slots(plan: Hyperparameters) -> tuple[str, ...]:
    if plan.optimiser == "adamw":
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if plan.momentum else ()
