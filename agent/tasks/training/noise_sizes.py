"""How much noise training for single rows adds, and which steps allow noise that peers share."""

from __future__ import annotations

import math

import numpy as np
import torch

from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.loop_state import LoopState
from protocols.errors import UsageError
from protocols.privacy.events import Event
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.shared_noise import MIN_STEPS

_ALONE = "--dp-shared 1, with which each peer adds all of the noise alone"
_FULL = "--set batch_size=all --set epochs=1"


def noise_of(
    at: LoopState, plan: Hyperparameters, private: PrivateTraining, examples: int, batch: int
) -> tuple[Event, int, float]:
    """What a round costs, its steps, and the standard deviation of the noise on each sum of
    gradients. Raises UsageError if the noise cannot be shared in such a training.
    """
    steps = plan.epochs * -(-examples // batch)
    steps = min(steps, plan.max_steps) if plan.max_steps else steps
    if not private.is_shared:
        event = private.event(batch / examples, steps)
        return event, steps, event.noise * private.clip
    if steps != 1 or batch != examples:
        raise UsageError(
            "peers can share the noise of one step over all rows in a round, and this round has "
            f"{steps} steps of {batch} of {examples} rows: each further step would need noise of "
            "its own",
            f"{_FULL}; or {_ALONE}",
        )
    bent = ("momentum", "weight_decay", "clip_norm", "proximal_mu")
    if plan.optimiser != "sgd" or any(getattr(plan, name) for name in bent) or at.correction:
        raise UsageError(
            "peers can share the noise of a step of plain SGD, and this step is another one",
            f"--set optimiser=sgd, with {', '.join(bent)} at 0; or {_ALONE}",
        )
    shared = private.shared_event(plan.lr)
    std = shared.noise * private.clip / math.sqrt(private.shared)
    _check_floats(at, plan.lr * std / examples, plan.lr * private.clip)
    return shared, steps, std


def _check_floats(at: LoopState, std: float, row: float) -> None:
    """Raise UsageError if float32 is too coarse for noise of `std` on each weight.

    `row`: the largest mean gradient times the learning rate, which is rounded, too.
    """
    trained = [at.weights[name] for name in at.trained]
    if any(tensor.dtype != torch.float32 for tensor in trained):
        raise UsageError("shared noise needs weights in float32", _ALONE)
    largest = max(
        [row, *(float(tensor.detach().abs().max()) for tensor in trained if tensor.numel())]
    )
    if not MIN_STEPS * float(np.spacing(np.float32(largest))) <= std:
        raise UsageError(
            f"the noise of one peer, {std:.2g} on each weight, is too small for float32 with "
            f"weights up to {largest:.2g}",
            f"a larger learning rate or a smaller ε; or {_ALONE}",
        )
