"""The inputs of SCAFFOLD from a torch task: how far its steps move the weights, and its whole
gradient."""

from __future__ import annotations

import torch

from agent.tasks.training.examples import Source, count_examples
from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.torch_loop import LossOf
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
    tensors: Tensors,
    examples: Source,
    loss_of: LossOf,
    fixed: frozenset[str],
    batch: int,
) -> dict[str, Array]:
    """The gradient of the mean loss over all examples by weight, in batches of `batch`;
    those that are `fixed` have none. It is also the `grad` of the tensors."""
    count = examples.size
    trained = {
        name: tensor.requires_grad_()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and name not in fixed
    }
    for tensor in trained.values():
        tensor.grad = None  # of an earlier training
    for x, y in examples.batches(torch.arange(count), batch):
        part = count_examples((x, y)) / count
        (loss_of(tensors, x, y) * part).backward()  # type: ignore[no-untyped-call]
    return {
        name: (tensor.grad.float() if tensor.dtype == torch.bfloat16 else tensor.grad).cpu().numpy()
        for name, tensor in trained.items()
        if tensor.grad is not None
    }
