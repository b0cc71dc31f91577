"""The training loop of torch tasks, which can resume between two batches.

`hyperparameters` has its settings. On a CPU the same inputs and number of threads give the same
bytes.

    local = TrainingLoop()
    local.train(weights, read_hyperparameters(settings), examples, autograd_step(loss_of), on_step)

`TorchTask` is a task around it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.tasks import OnStep, Snapshot, TrainOutcome, Watch
from agent.tasks.training import precision
from agent.tasks.training.batch_size import run_or_suggest_batch_size
from agent.tasks.training.clipped_gradients import ClippedGradients, LossesOf, examples_depend
from agent.tasks.training.examples import Batch, Source, count_examples, slice_examples, split_batch
from agent.tasks.training.examples import Examples as Examples
from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.loop_state import LoopState as LoopState
from agent.tasks.training.loop_state import Tensors as Tensors
from agent.tasks.training.loop_state import as_weights
from agent.tasks.training.noise_sizes import noise_of
from agent.tasks.training.secret_noise import SecretNoise
from agent.tasks.training.seeds import derive_seed
from protocols.errors import DataError, UsageError
from protocols.model.weights import Array
from protocols.privacy.events import Event
from protocols.privacy.private_training import PrivateTraining

_RESTARTS = "training continues; its data have an order of their own, so they begin again\n"

#: What weights may be, so that no rounding makes a clipped gradient longer than the clip.
_FINE = (torch.float32, torch.float64)

#: One step, in place; returns the batch's mean loss before it, as `loss_value` does.
Step = Callable[[Any, Any], float | Tensor]
MakeStep = Callable[[LoopState, Hyperparameters], Step]
#: The mean loss of a batch: `loss_of(weights, x, y) -> float32[]`.
LossOf = Callable[[Tensors, Any, Any], Tensor]
#: Makes the optimizer of a task's own.


class PrivateLoss(NamedTuple):
    """What training with noise for single rows needs of a task.

    `losses_of(weights, x, y) -> float32[n]` are the losses of single examples; `is_separate`: as in
    `ClippedGradients`.
    """

    losses_of: LossesOf
    is_separate: bool = False


class TrainingLoop:
    """The loop, with the methods of `Resumable`, `SupportsScaffold` and `KeepsOptimizerState` for a
    task."""

    def __init__(self) -> None:
        self._at: LoopState | None = None
        self._restored: Snapshot | None = None
        self._correction: Mapping[str, Array] = {}
        self._recalled: Mapping[str, Array] = {}
        self._left: Mapping[str, Array] = {}
        self._watch: Watch = lambda places: None
        self._anchor: Mapping[str, Array] = {}
        self._private: PrivateTraining | None = None
        self._spent: tuple[Event, ...] = ()

    def train(
        self,
        weights: Mapping[str, Array] | Tensors,
        plan: Hyperparameters,
        examples: Source,
        make_step: MakeStep,
        on_step: OnStep,
        *,
        buffers: frozenset[str] = frozenset(),
        frozen: frozenset[str] = frozenset(),
        private_loss: PrivateLoss | None = None,
    ) -> TrainOutcome:
        """Train on these examples; the metric "loss" is the mean of the last epoch.

        Tensors are trained in place, and arrays in a copy. `buffers` are floating-point tensors
        that the model itself changes, `frozen` those that keep their value. `private_loss` is for
        training with noise (`protect`), which tells no metric.
        """
        device, count = examples.device, examples.size
        private, self._private, self._spent = self._private, None, ()
        if private is not None:  # rounded products would exceed the bound on a clipped gradient
            plan = plan._replace(precision="fp32")
        if private is not None and (private_loss is None or buffers or self._correction):
            raise examples_depend()
        fixed = buffers | frozen
        at = LoopState(weights, plan, device, examples.part, fixed, self._correction)
        at.pull_to(self._anchor)
        at.load_optimizer_state(self._recalled)
        if self._restored is not None:
            at.restore(self._restored)
        self._at, self._restored, self._correction, self._recalled = at, None, {}, {}
        watch, self._watch = self._watch, lambda places: None
        metrics: dict[str, float] = {}
        try:
            if private is not None and private_loss is not None:
                watch(np.arange(count))
                event = _train_privately(at, plan, examples, private, private_loss, on_step)
                self._spent = (event,)
            else:
                loss = _train_epochs(at, plan, examples, make_step(at, plan), watch, on_step)
                metrics = {"loss": loss}
        finally:
            self._at = None
        self._left = at.optimizer_state()
        return TrainOutcome(as_weights(at.weights), count, metrics)

    def protect(self, private: PrivateTraining | None) -> None:
        """Make the next `train` add noise, so that no single example shows; None: no noise."""
        self._private = private

    def spent(self) -> tuple[Event, ...]:
        """The cost of the last `train` in privacy; empty without noise."""
        return self._spent

    def watch_epochs(self, watch: Watch) -> None:
        """Make the next `train` call this before each epoch, with the places of the examples
        that it uses."""
        self._watch = watch

    def start_single_step(self, count: int) -> None:
        """Begin a training that is one step over all of `count` examples, without this loop. Raises
        UsageError if it should add noise."""
        private, self._private, self._spent = self._private, None, ()
        if private is not None:
            raise UsageError("trees cannot be trained with noise for single rows", "leave --dp out")
        watch, self._watch = self._watch, lambda places: None
        self._restored = None
        watch(np.arange(count))

    def snapshot(self) -> Snapshot:
        """The state of `train`: weights, optimizer, order of the data and position in it."""
        if self._at is None:  # a single step has no position
            return Snapshot({}, {})
        return self._at.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Make the next `train` resume from there."""
        self._restored = snapshot

    def steer(self, correction: Mapping[str, Array]) -> None:
        """Make the next `train` add this to the gradient of each step: SCAFFOLD's c - c_i by weight
        (arXiv 1910.06378, equation 3)."""
        self._correction = correction

    def pull_to(self, version: Mapping[str, Array]) -> None:
        """Make the proximal term of later trainings that of this version; without tensors, that of
        the weights with which a training begins."""
        self._anchor = version

    def load_optimizer_state(self, state: Mapping[str, Array]) -> None:
        """Start the next `train` with the `optimizer_state` of an earlier one."""
        self._recalled = state

    def optimizer_state(self) -> Mapping[str, Array]:
        """The optimizer state after the last `train`."""
        return self._left


def _train_epochs(
    at: LoopState,
    plan: Hyperparameters,
    examples: Source,
    step: Step,
    watch: Watch,
    on_step: OnStep,
) -> float:
    """Train in place, on each example once an epoch; returns the mean loss of the last epoch."""
    count = examples.size
    steps, batch, tail = plan.steps(count), plan.batch_size or count, plan.tail(count)
    if examples.has_own_order and at.passed:
        sys.stderr.write(_RESTARTS)
    while True:
        order = at.permutation(count)
        ahead = at.passed + (steps - at.done) * batch
        watch(order[: count if ahead > count - tail else ahead].numpy())
        draw = derive_seed("draw", plan.seed, plan.round, examples.part, at.seen)
        with closing(examples.batches(order[at.passed :], batch, tail, draw)) as batches:
            for read in batches:
                if at.done == steps:
                    break
                size = count_examples(read)
                loss = run_or_suggest_batch_size(partial(_step_of, step, read, size), size)
                at.done += 1
                at.passed += size
                at.total += loss * size
                on_step(at.done, steps, loss, at.seen + at.passed)
        if at.done == steps:
            return float(at.total) / at.passed
        if not at.passed:
            raise DataError("the data set gives no example to train on")
        at.next_epoch()


def _train_privately(
    at: LoopState,
    plan: Hyperparameters,
    examples: Source,
    private: PrivateTraining,
    loss: PrivateLoss,
    on_step: OnStep,
) -> Event:
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1), in place; returns what it costs.

    Each step takes a Poisson sample, whose expected size is the batch. The divisor is that size,
    which is public, and not the number of examples in the sample. No loss is returned.
    """
    count = examples.size
    batch = min(plan.batch_size or count, count)
    event, steps, std = noise_of(at, plan, private, count, batch)
    noise = SecretNoise()
    gradients = ClippedGradients(loss.losses_of, at.trained, private.clip, loss.is_separate)
    optimiser = _optimiser(at, plan)
    if any(at.weights[name].dtype not in _FINE for name in at.trained):
        raise UsageError("--dp needs weights in float32: others round beyond --dp-clip")
    precision.use(plan.precision, examples.device)
    while at.done < steps:
        places = torch.from_numpy(noise.sample(count, batch / count))
        sums = {name: torch.zeros_like(at.weights[name]) for name in at.trained}
        draw = derive_seed("draw", plan.seed, plan.round, examples.part, at.done)
        for x, y in examples.batches(places, max(1, len(places)), draw=draw):
            if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
                raise UsageError("--dp needs one tensor as input and one as target of an example")
            sums = gradients.sum(at.weights, x, y)
        for name in at.trained:
            total = sums[name].double().cpu().numpy()
            total += std * noise.normals(total.size).reshape(total.shape)
            at.weights[name].grad = torch.from_numpy(total / batch).to(at.weights[name])
        _move(at, plan, optimiser)
        at.done += 1
        at.passed += batch
        on_step(at.done, steps, math.nan, at.seen + at.passed)
    return event


def _step_of(step: Step, batch: Batch, count: int, size: int) -> float | Tensor:
    """A step of the first `size` of the `count` examples of a batch."""
    return step(*(batch if size == count else slice_examples(batch, 0, size)))


def autograd_step(
    loss_of: LossOf, own: torch.optim.Optimizer | None = None, micro_batch: int = 0
) -> MakeStep:
    """Steps on the loss of a task, of its `own` optimizer or of that of the plan.

    With a `micro_batch`, a step has the activations of at most that many examples in memory.
    """

    def make(at: LoopState, plan: Hyperparameters) -> Step:
        w = at.weights
        trained = [w[name].requires_grad_() for name in at.trained]
        if own is not None:
            at.use_optimizer(own)
        optimiser = at.optimizer or _optimiser(at, plan)
        forward = precision.use(plan.precision, trained[0].device)

        def add_gradient(batch: Batch, share: float) -> Tensor:
            with forward:
                loss = loss_of(w, *batch)
            if share != 1:
                loss = loss * share
            at.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        def step(x: Any, y: Any) -> float | Tensor:
            optimiser.zero_grad()
            first, *others = (add_gradient(*part) for part in split_batch((x, y), micro_batch))
            _move(at, plan, optimiser)
            return loss_value(sum(others, first))

        return step

    return make


def loss_value(loss: Tensor) -> float | Tensor:
    """The number; on a graphics card float64[] there, so that the next step need not wait."""
    return loss.detach().double() if loss.is_cuda else loss.item()


def _optimiser(at: LoopState, plan: Hyperparameters) -> torch.optim.Optimizer:
    """A new optimizer that shares its state with `at`."""
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


def _move(at: LoopState, plan: Hyperparameters, optimiser: torch.optim.Optimizer) -> None:
    """Take the optimizer's step by the gradients, corrected and clipped as the plan says."""
    at.scaler.unscale_(optimiser)
    if at.correction or at.origin:
        _adjust_gradients(at, plan)
    if plan.clip_norm:
        torch.nn.utils.clip_grad_norm_([at.weights[name] for name in at.trained], plan.clip_norm)
    at.scaler.step(optimiser)
    at.scaler.update()


@torch.no_grad()
def _adjust_gradients(at: LoopState, plan: Hyperparameters) -> None:
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
