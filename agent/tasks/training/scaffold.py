"""What a torch task tells SCAFFOLD: how far its steps move the weights, and its whole gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.torch_loop import Examples, LossOf
from protocols.errors import UsageError
from protocols.model.weights import Array


def lr_times_steps(plan: Hyperparameters, examples: int) -> float:
    """Learning rate times steps of training on `examples` examples.

    Raises UsageError unless the weights move by exactly that times the gradients.
    """
    bent = ("momentum", "weight_decay", "clip_norm", "proximal_mu")
    if plan.optimiser != "sgd" or any(getattr(plan, name) for name in bent):
        raise UsageError(
            "SCAFFOLD steers plain SGD only", f"optimiser=sgd, and {', '.join(bent)} at 0"
        )
    if not plan.lr:
        raise UsageError("SCAFFOLD needs a learning rate above 0", "lr=0.1")
    return plan.lr * plan.steps(examples)


def mean_gradient(
    weights: Mapping[str, Array],
    examples: Examples,
    loss_of: LossOf,
    buffers: frozenset[str],
    batch: int,
) -> dict[str, Array]:
    """The gradient of the mean loss over all examples by weight, in batches of `batch`;
    `buffers` have none."""
    device, count = examples.x.device, len(examples.y)
    tensors = {name: torch.tensor(array, device=device) for name, array in weights.items()}
    trained = {
        name: tensor.requires_grad_()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and name not in buffers
    }
    for rows in torch.arange(count, device=device).split(batch):  # type: ignore[no-untyped-call]
        x, y = examples.x[rows], examples.y[rows]
        (loss_of(tensors, x, y) * (len(y) / count)).backward()  # type: ignore[no-untyped-call]
    return {
        name: tensor.grad.cpu().numpy()
        for name, tensor in trained.items()
        if tensor.grad is not None
    }
