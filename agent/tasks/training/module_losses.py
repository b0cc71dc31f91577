"""The loss of an `nn.Module` on a batch, and the losses of single examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from agent.tasks.training import module_state
from agent.tasks.training.clipped_gradients import LossesOf
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.torch_loop import LossOf

#: `loss(output, target) -> float32[]`, the mean over a batch.
Loss = Callable[[Any, Any], Tensor]


def mean_loss(loss: Loss, model: nn.Module, *, compiled: bool) -> LossOf:
    """The loss of the model itself, whose tensors are the weights."""
    buffers = [name for name, t in model.named_buffers() if t is not None]
    forward = torch.compile(model) if compiled else model

    def loss_of(w: Tensors, x: Any, y: Any) -> Tensor:
        found = loss(module_state.call(forward, x), y)
        for name in buffers:  # a model may replace a buffer instead of changing it
            if name in w and (now := model.get_buffer(name)) is not w[name]:
                w[name] = now.detach()
        return found

    return loss_of


def single_losses(loss: Loss, model: nn.Module) -> LossesOf:
    """The losses of single examples, each as a batch of its own. Counters stay as they are."""

    def losses_of(w: Tensors, x: Any, y: Any) -> Tensor:
        w = {name: t if t.is_floating_point() else t.clone() for name, t in w.items()}

        def loss_of_one(x_one: Any, y_one: Any) -> Tensor:
            return loss(functional_call(model, w, (x_one[None],)), y_one[None])

        return vmap(loss_of_one, randomness="different")(x, y)

    return losses_of
