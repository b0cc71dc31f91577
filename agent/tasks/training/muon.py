"""The optimizer `muon`: Muon for the matrices of a model, AdamW for its other parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes steps along the momentum
with all singular values made equal. As inner optimizer of DiLoCo it needs fewer bits of an update
than AdamW (Thérien et al. 2025, arXiv 2505.23725).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agent.tasks.training.hyperparameters import Hyperparameters
from protocols.errors import UsageError

#: Steps as large as those of AdamW, so that both have one learning rate (Liu et al. 2025, arXiv
#: 2502.16982, section 2.2).
_AS_ADAMW = "match_rms_adamw"


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer of two: Muon for `matrices`, AdamW with its usual betas for `others`."""

    def __init__(
        self, matrices: list[Tensor], others: list[Tensor], lr: float, weight_decay: float
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn=_AS_ADAMW)
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))
        super().__init__([part.param_groups[0] for part in self._parts], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # `load_state_dict` makes new ones
            part.step()


def muon_with_adamw(model: nn.Module, plan: Hyperparameters) -> torch.optim.Optimizer:
    """The optimizer of a model. Embeddings are no matrices in this sense, also where an output
    layer shares them. Raises UsageError if PyTorch lacks Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(
            f"optimiser=muon needs PyTorch 2.9 or later, and this peer has {torch.__version__}",
            "a newer PyTorch, or optimiser=adamw",
        )
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
            (matrices if is_matrix else others).append(parameter)
    return MuonWithAdamW(matrices, others, plan.lr, plan.weight_decay)
