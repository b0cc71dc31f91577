"""The state of local training between two batches, which snapshots save."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agent.tasks import Snapshot
from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.seeds import derive_seed
from protocols.model.weights import Array

Tensors = dict[str, Tensor]


class LoopState:
    """Training between two batches.

    `weights` and the optimizer's `state` (tensors by slot and weight, with torch's names) change in
    place. `trained` are the names of weights with gradients; the model itself updates the others
    (integers, running statistics). `done` counts steps, `passed` the examples of this epoch, `seen`
    those of earlier epochs; `total` is the sum of this epoch's losses. `origin` holds the first
    weights for the proximal term, `correction` what is added to each gradient. A snapshot omits
    both, because the inputs of the training have them.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        plan: Hyperparameters,
        device: torch.device,
        part: int,
        buffers: frozenset[str],
        correction: Mapping[str, Array],
    ) -> None:
        self.weights = {name: torch.tensor(array, device=device) for name, array in weights.items()}
        self.trained = [
            name
            for name, t in self.weights.items()
            if t.is_floating_point() and name not in buffers
        ]
        self.state = {slot: self._zeros(slot) for slot in _slots(plan)}
        self.origin: Tensors = {}
        if plan.proximal_mu:
            self.origin = {name: self.weights[name].clone() for name in self.trained}
        self.correction = {
            name: torch.tensor(array, device=device) for name, array in correction.items()
        }
        order = derive_seed("order", plan.seed, plan.round, part)
        self._order = torch.Generator().manual_seed(order)
        self._epoch_began = self._order.get_state()
        self.done = self.passed = self.seen = 0
        self.total = 0.0

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

    def load_optimizer_state(self, optimiser: Mapping[str, Array]) -> None:
        """Use this optimizer state, if it has the slots and shapes of this optimizer."""
        mine = {
            f"{s} {name}": t for s, tensors in self.state.items() for name, t in tensors.items()
        }
        if {key: tensor.shape for key, tensor in mine.items()} == {
            key: array.shape for key, array in optimiser.items()
        }:
            for key, tensor in mine.items():
                tensor.copy_(torch.tensor(optimiser[key]))

    def snapshot(self) -> Snapshot:
        arrays = as_arrays(self._slots())
        arrays["order"] = self._epoch_began.numpy()
        counts = {"done": self.done, "passed": self.passed, "seen": self.seen}
        return Snapshot(arrays, {**counts, "total": self.total})

    def restore(self, snapshot: Snapshot) -> None:
        arrays, values = snapshot
        for slot, tensors in self._slots().items():
            for name, tensor in tensors.items():
                tensor.copy_(torch.tensor(arrays[f"{slot} {name}"]))
        self._epoch_began = torch.tensor(arrays["order"])
        self.done, self.passed, self.seen = (int(values[n]) for n in ("done", "passed", "seen"))
        self.total = float(values["total"])

    def _slots(self) -> dict[str, Tensors]:
        return {"weight": self.weights, **self.state}


def as_arrays(slots: Mapping[str, Tensors]) -> dict[str, Array]:
    """Tensors by slot and weight as arrays by "slot weight"."""
    return {
        f"{slot} {name}": tensor.detach().cpu().numpy()
        for slot, tensors in slots.items()
        for name, tensor in tensors.items()
    }


def _slots(plan: Hyperparameters) -> tuple[str, ...]:
    if plan.optimiser == "adamw":
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if plan.momentum else ()
