"""Local training of a torch task: the loop, and the place in it to go on from.

A torch task is a model, its data, and this loop; its settings are in `plan`. On a CPU the same
inputs and number of threads give the same bytes.

    DEFAULTS = {**LOOP, "model": "mlp", "lr": 0.01}

    class Tabular:
        def __init__(self) -> None:
            self._local = LocalTraining()
            self.snapshot, self.restore = self._local.snapshot, self._local.restore

        def train(self, weights, settings, on_step):
            plan = read_plan(settings, DEFAULTS)
            return self._local.train(weights, plan, self._examples, by_autograd(loss_of), on_step)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from agent.tasks import OnStep, Snapshot, TrainOutcome
from agent.tasks.fitting import tried
from agent.tasks.plan import Plan
from agent.tasks.seeds import seed_of
from protocols.errors import UsageFault
from protocols.weights import Array, Weights

Tensors = dict[str, Tensor]

#: Examples that are put in order at a time, so that an epoch needs no second copy of the data.
_ORDERED = 4096


class Examples(NamedTuple):
    """A peer's examples: [n, …] and [n], both where they are trained on. `part` sets their order
    apart from other peers'."""

    x: Tensor
    y: Tensor
    part: int = 0


#: One step, in place; returns the batch's mean loss before it.
Step = Callable[[Tensor, Tensor], float]
#: The mean loss of a batch: `loss_of(weights, x, y) -> float32[]`.
LossOf = Callable[[Tensors, Tensor, Tensor], Tensor]


class Position:
    """Training between two batches: what a snapshot holds, and nothing else.

    `weights` and the optimiser's `state` (tensors by slot and weight, named as torch names them)
    are changed in place. `trained` are the names of the weights that gradients move; the others
    (integers, running statistics) are the model's own affair. `done` counts steps; `passed` and
    `seen` the examples of this epoch and of those before it; `total` is the sum of this epoch's
    losses. `origin` holds the first weights for the proximal term, `correction` what is added to
    each gradient: a snapshot need not hold what is there anyway.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        plan: Plan,
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
        order = seed_of("order", plan.seed, plan.round, part)
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

    def snapshot(self) -> Snapshot:
        arrays = {
            f"{slot} {name}": tensor.detach().cpu().numpy()
            for slot, tensors in self._slots().items()
            for name, tensor in tensors.items()
        }
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


def _slots(plan: Plan) -> tuple[str, ...]:
    if plan.optimiser == "adamw":
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if plan.momentum else ()


class LocalTraining:
    """The loop, and `Resumable`'s and `Steerable`'s methods for the task that it works for."""

    def __init__(self) -> None:
        self._at: Position | None = None
        self._restored: Snapshot | None = None
        self._correction: Mapping[str, Array] = {}

    def train(
        self,
        weights: Mapping[str, Array],
        plan: Plan,
        examples: Examples,
        make_step: Callable[[Position, Plan], Step],
        on_step: OnStep,
        *,
        buffers: frozenset[str] = frozenset(),
    ) -> TrainOutcome:
        """Train on these examples; the metric "loss" is the mean of the last epoch.

        `buffers` are floating-point tensors that no gradient moves.
        """
        device, count = examples.x.device, len(examples.y)
        at = Position(weights, plan, device, examples.part, buffers, self._correction)
        if self._restored is not None:
            at.restore(self._restored)
        self._at, self._restored, self._correction = at, None, {}
        step, steps = make_step(at, plan), plan.steps(count)
        batch = plan.batch_size or count
        try:
            while True:
                order = at.permutation(count)[at.passed :].to(device)
                for x, y in _batches(examples, order, batch):
                    if at.done == steps:
                        break
                    loss = tried(partial(_step_of, step, x, y), len(y))
                    at.done += 1
                    at.passed += len(y)
                    at.total += loss * len(y)
                    on_step(at.done, steps, loss, at.seen + at.passed)
                if at.done == steps:
                    break
                at.next_epoch()
        finally:
            self._at = None
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in at.weights.items()}
        return TrainOutcome(Weights(arrays), count, {"loss": at.total / at.passed})

    def snapshot(self) -> Snapshot:
        """Where `train` is: weights, optimiser, the order of the data and the place in it."""
        assert self._at is not None
        return self._at.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Let the next `train` go on from there."""
        self._restored = snapshot

    def steer(self, correction: Mapping[str, Array]) -> None:
        """Let the next `train` add this to each step's gradient: SCAFFOLD's c - c_i, by weight
        (arXiv 1910.06378, equation 3)."""
        self._correction = correction


def path(plan: Plan, examples: int) -> float:
    """Learning rate times steps of training on so many examples.

    Raises UsageFault where the weights would move by more than that times the gradients.
    """
    bent = ("momentum", "weight_decay", "clip_norm", "proximal_mu")
    if plan.optimiser != "sgd" or any(getattr(plan, name) for name in bent):
        raise UsageFault(
            "SCAFFOLD steers plain SGD only", f"optimiser=sgd, and {', '.join(bent)} left at 0"
        )
    if not plan.lr:
        raise UsageFault("SCAFFOLD needs a learning rate above 0", "lr=0.1")
    return plan.lr * plan.steps(examples)


def mean_gradient(
    weights: Mapping[str, Array],
    examples: Examples,
    loss_of: LossOf,
    buffers: frozenset[str] = frozenset(),
) -> dict[str, Array]:
    """The gradient of the mean loss over all examples, by weight; `buffers` have none."""
    device, count = examples.x.device, len(examples.y)
    tensors = {name: torch.tensor(array, device=device) for name, array in weights.items()}
    trained = {
        name: tensor.requires_grad_()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and name not in buffers
    }
    for rows in torch.arange(count, device=device).split(_ORDERED):  # type: ignore[no-untyped-call]
        x, y = examples.x[rows], examples.y[rows]
        (loss_of(tensors, x, y) * (len(y) / count)).backward()  # type: ignore[no-untyped-call]
    return {
        name: tensor.grad.cpu().numpy()
        for name, tensor in trained.items()
        if tensor.grad is not None
    }


def _step_of(step: Step, x: Tensor, y: Tensor, size: int) -> float:
    """A step of the first `size` examples of a batch."""
    return step(x, y) if size == len(y) else step(x[:size], y[:size])


def _batches(examples: Examples, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if not len(
        order
    ):  # cut off at an epoch's end; nothing would be split into one batch of nothing
        return
    for rows in torch.split(order, size * max(1, _ORDERED // size)):
        x, y = examples.x[rows], examples.y[rows]
        yield from zip(torch.split(x, size), torch.split(y, size), strict=True)


def by_autograd(loss_of: LossOf) -> Callable[[Position, Plan], Step]:
    """Steps of torch's own optimisers on the loss that a task tells."""

    def make(at: Position, plan: Plan) -> Step:
        w = at.weights
        trained = [w[name].requires_grad_() for name in at.trained]
        optimiser = _optimiser(at, plan)
        forward = _precision(plan.precision, trained[0].device)

        def step(x: Tensor, y: Tensor) -> float:
            optimiser.zero_grad()
            with forward:
                loss = loss_of(w, x, y)
            loss.backward()  # type: ignore[no-untyped-call]
            if at.correction or at.origin:
                _bend(at, plan)
            if plan.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, plan.clip_norm)
            optimiser.step()
            return loss.item()

        return step

    return make


def _optimiser(at: Position, plan: Plan) -> torch.optim.Optimizer:
    """A new optimiser that goes on from the state of `at`, and writes to it."""
    trained = [at.weights[name] for name in at.trained]
    made: torch.optim.Optimizer
    if plan.optimiser == "adamw":
        made = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=plan.weight_decay)
    else:
        made = torch.optim.SGD(
            trained, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay
        )
    for slot, tensors in at.state.items():
        for name, tensor in tensors.items():
            made.state[at.weights[name]][slot] = tensor
    return made


@torch.no_grad()
def _bend(at: Position, plan: Plan) -> None:
    """Add the correction, and the gradient of mu/2 |w - origin|² (Li et al. 2020, arXiv 1812.06127,
    equation 2)."""
    for name in at.trained:
        gradient = at.weights[name].grad
        if gradient is None:
            continue
        if name in at.correction:
            gradient.add_(at.correction[name])
        if name in at.origin:
            gradient.add_(at.weights[name] - at.origin[name], alpha=plan.proximal_mu)


def _precision(name: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """In what the forward pass is computed. Raises UsageFault where the device lacks it."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if name == "fp32" or (name == "auto" and not fast):
        return contextlib.nullcontext()
    if device.type == "cuda" and not fast:
        raise UsageFault("this graphics card has no bf16", "precision=auto or precision=fp32")
    return torch.autocast(device.type, torch.bfloat16)
