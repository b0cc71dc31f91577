"""Adapters whose products are added up: what a version adds to each layer, and what is trained.

With `aggregation=stack`, a version holds for each layer the sum of all products so far, which is
added to the layer's output; each round trains new factors, so a peer may have any rank (FLoRA: Wang
et al. 2024, arXiv 2409.05976). With `svd`, a version holds factors of the run's rank; a peer trains
the first ones, as many as it has room for (FlexLoRA: Bai et al. 2024, arXiv 2402.11505).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import random_state
from protocols.codecs.factors import AUTO_RANK, DELTA, A, B
from protocols.errors import UsageError
from protocols.model.weights import Array

WAYS = ("stack", "svd")
#: Of a device's memory, for adapters with gradients and the two moments of AdamW.
SHARE_OF_MEMORY = 0.02
BYTES_OF_PARAMETER = 16


class Added(nn.Module):
    """The part of a version that is added to the output of one layer: as a product, or as its
    factors.

    `layer`: of PEFT, with factors A and B that are trained. `scale`: that of their product. `name`:
    of the layer, as it travels.
    """

    product: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, layer: Any, name: str, rank: int, *, keeps_product: bool) -> None:
        super().__init__()
        self.name, self._keeps_product = name, keeps_product
        self.a, self.b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self.scale = float(layer.scaling["default"])
        (_, inputs), (out, _) = self.a.shape, self.b.shape
        if keeps_product:
            self.register_buffer("product", torch.zeros(out, inputs))
        else:
            self.register_buffer("first", torch.zeros(rank, inputs))
            self.register_buffer("second", torch.zeros(out, rank))
            self.first.copy_(_draw(name, rank, inputs) * math.sqrt(self.scale))
        self._is_on = True
        self._layers = (layer,)  # not a module of its own
        layer.register_forward_hook(self._add)

    def _add(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._is_on:
            return output
        x = args[0].to(torch.float32)
        if self._keeps_product:
            added = F.linear(x, self.product)
        else:
            added = F.linear(F.linear(x, self.first), self.second)
        return output + added.to(output.dtype)

    def travelling(self) -> Tensors:
        """The tensors of a version."""
        if self._keeps_product:
            return {self.name + DELTA: self.product}
        return {self.name + A: self.first, self.name + B: self.second}

    def trained(self) -> Tensors:
        """The parameters, by the names of an update."""
        return {self.name + A: self.a, self.name + B: self.b}

    @torch.no_grad()
    def show(self) -> None:
        """Add the version alone, as evaluations and predictions do."""
        self._is_on = True
        self.b.zero_()

    @torch.no_grad()
    def begin(self, *seed: object) -> None:
        """Set the first values of a round."""
        self._is_on = self._keeps_product
        if self._keeps_product:
            self.a.copy_(_draw(self.name, *self.a.shape, *seed))
            self.b.zero_()
            return
        rank, root = len(self.a), math.sqrt(self.scale)
        self.a.copy_(self.first[:rank] / root)
        self.b.copy_(self.second[:, :rank] / root)

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the version's part into the layer's weights, permanently."""
        self.show()
        found = self.product if self._keeps_product else self.second @ self.first
        weight = self._layers[0].get_base_layer().weight
        found = found.T if self._layers[0].fan_in_fan_out else found
        weight.copy_(weight.float() + found)
        self._is_on = False

    def update(self, trained: Mapping[str, Array]) -> dict[str, Array]:
        """The factors as they are sent: their product is added to the layer."""
        root = math.sqrt(self.scale)
        return {name: np.multiply(trained[name], np.float32(root)) for name in self.trained()}


def _draw(name: str, rank: int, inputs: int, *seed: object) -> Tensor:
    """First values of A, in the range of PEFT."""
    bound = 1 / math.sqrt(inputs)
    values = random_state("lora A", name, *seed).uniform(-bound, bound, (rank, inputs))
    return torch.from_numpy(values).float()


def add_to(model: Any, names: Mapping[str, str], rank: int, way: str) -> nn.ModuleList:
    """An `Added` for each layer with adapters. `names`: the parameters by their travelling names.

    `rank`: of the version, if it has factors. Raises UsageError for adapters without two matrices.
    """
    found = nn.ModuleList()
    modules = dict(model.named_modules())
    for name, inner in sorted(names.items()):
        if "lora_embedding" in name or (A in name and model.get_parameter(inner).dim() != 2):
            raise UsageError(
                f"aggregation={way} cannot adapt embeddings and convolutions",
                "--set aggregation=average",
            )
        if name.endswith(A):
            layer = modules[inner.rpartition(".lora_A.")[0]]
            added = Added(layer, name.removesuffix(A), rank, keeps_product=way == "stack")
            found.append(added)
    return found


def rank_for(memory_bytes: int, numbers: int) -> int:
    """The largest power of two, up to AUTO_RANK, at which adapters take a fiftieth of the memory.

    `numbers`: parameters of all adapters at rank 1.
    """
    most = SHARE_OF_MEMORY * memory_bytes / (BYTES_OF_PARAMETER * max(numbers, 1))
    return max(1, min(AUTO_RANK, 1 << max(int(most).bit_length() - 1, 0)))


def memory_bytes(device: torch.device) -> int:
    """All memory of a device, so that a rank stays the same from round to round."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
