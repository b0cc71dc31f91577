"""What the built-in tasks share beside `TorchTask`: models without first weights of their own.

A task gives the first weights in `init`, so its layers have none, which would take time.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from agent.tasks import Settings as RunSettings
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.module_task import TorchTask
from agent.tasks.training.torch_loop import PrivateLoss
from protocols.model.weights import Weights


class Linear(nn.Linear):
    """A linear layer without first weights."""

    def reset_parameters(self) -> None:
        """Leave them as they are."""


class Conv2d(nn.Conv2d):
    """A convolution without first weights."""

    def reset_parameters(self) -> None:
        """Leave them as they are."""


class Embedding(nn.Embedding):
    """An embedding without first weights."""

    def reset_parameters(self) -> None:
        """Leave them as they are."""


class BuiltInTask(TorchTask):
    """A task of this package. Its model changes nothing but weights, so none is kept."""

    version = "1"
    #: The names of the settings that `data` depends on.
    _reads: tuple[str, ...] = ()
    #: True if the model draws random numbers, so that an example has another loss each time.
    _is_random = False
    _least_batch = 1

    def _build(self, settings: RunSettings, *words: object) -> nn.Module:
        return self.model(self._read(settings)).to(self._device).train()

    def _idle_model(self, settings: RunSettings) -> nn.Module:
        return self._build(settings)

    def _filled(self, model: nn.Module, weights: Weights) -> Tensors:
        """In the order of their names, by which norms of gradients are added up."""
        return dict(sorted(super()._filled(model, weights).items()))

    def _data_key(self, settings: RunSettings) -> object:
        read = self._read(settings)
        return *(read[name] for name in self._reads), settings.get("preprocessing")

    def _private_loss(self, model: nn.Module) -> PrivateLoss:
        def losses_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(model, w, (x,))
            loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
            losses = loss(output, y, reduction="none")
            return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

        return PrivateLoss(losses_of, is_separate=self._is_random)
