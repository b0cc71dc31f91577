"""The networks of the task "images" in PyTorch: pictures in, logits out.

ResNet-18 (He et al. 2015, arXiv 1512.03385) has torchvision's names. The norm after each of its
convolutions is that of groups of channels (Wu and He 2018, arXiv 1803.08494) or of the batch; the
latter keeps running statistics, which are averaged over peers like weights but moved by no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.tasks.images.dataset import MEAN, SPREAD
from agent.tasks.images.layer_spec import Layer
from agent.tasks.training.built_in import Conv2d, Linear
from protocols.model.weights import Array, Schema, Weights

_GROUPS = 32
_WIDTHS = (64, 128, 256, 512)


class PictureNetwork(nn.Module):
    """Pixels uint8[n, channels, size, size] -> logits float32[n, classes]. In training a random
    half of the pictures is mirrored if `flip`."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self._flip = flip

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.float() / 255 - MEAN) / SPREAD
        if self.training and self._flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Of normalized pictures float32[n, channels, size, size]."""
        raise NotImplementedError


class BatchNorm(nn.Module):
    """Batch normalization of [n, units, …].

    The last batch of an epoch may be a single example, of which there is no variance: then the
    running statistics serve, as in an evaluation. A codec may have brought a variance below 0.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))
        self.bias = nn.Parameter(torch.zeros(units))
        self.register_buffer("running_mean", torch.zeros(units))
        self.register_buffer("running_var", torch.ones(units))

    def forward(self, x: Tensor) -> Tensor:
        trains = self.training and x.numel() > x.shape[1]
        variance = self.running_var if trains else self.running_var.clamp_min(0)
        return F.batch_norm(x, self.running_mean, variance, self.weight, self.bias, trains)


class LayerNetwork(PictureNetwork):
    """The layers of a `layer_spec`."""

    def __init__(self, layers: Sequence[Layer], flip: bool) -> None:
        super().__init__(flip)
        self._layers = layers
        for layer in layers:
            made: Conv2d | Linear
            if layer.kind == "pool":
                continue
            if layer.kind == "conv":
                units, given, kernel, _ = layer.shape
                made = Conv2d(given, units, kernel, padding=kernel // 2, bias=not layer.norm)
            else:
                made = Linear(math.prod(layer.input_shape), layer.units, bias=not layer.norm)
            if layer.norm:
                made.norm = BatchNorm(layer.units)
            self.add_module(layer.name, made)

    def logits(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            if layer.kind == "pool":
                x = F.max_pool2d(x, 2)
                continue
            x = self.get_submodule(layer.name)(x if layer.kind == "conv" else x.flatten(1))
            x = self.get_submodule(f"{layer.name}.norm")(x) if layer.norm else x
            x = x if layer.kind == "output" else F.relu(x)
        return x


class _Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(
        self, given: int, made: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv2d(given, made, 3, stride, 1, bias=False), norm(made)
        self.conv2, self.bn2 = Conv2d(made, made, 3, 1, 1, bias=False), norm(made)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(Conv2d(given, made, 1, stride, bias=False), norm(made))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet(PictureNetwork):
    """ResNet-18 with the norm "group" or "batch"."""

    def __init__(self, channels: int, classes: int, norm: str, flip: bool = False) -> None:
        super().__init__(flip)

        def normed(units: int) -> nn.Module:
            return BatchNorm(units) if norm == "batch" else nn.GroupNorm(_GROUPS, units)

        given = _WIDTHS[0]
        self.conv1, self.bn1 = Conv2d(channels, given, 7, 2, 3, bias=False), normed(given)
        for stage, made in enumerate(_WIDTHS, 1):
            first = _Block(given, made, 2 if stage > 1 else 1, normed)
            self.add_module(f"layer{stage}", nn.Sequential(first, _Block(made, made, 1, normed)))
            given = made
        self.fc = Linear(given, classes)

    def logits(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, len(_WIDTHS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        output: Tensor = self.fc(x.mean((2, 3)))
        return output


def first_resnet(schema: Schema, draw: np.random.RandomState) -> Weights:
    """First weights: normal with variance 2 / fan-out for filters, as torchvision begins."""
    tensors: dict[str, Array] = {}
    for name, (_, shape) in schema.items():
        if len(shape) == 4:
            spread = math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
            array = draw.normal(0, spread, shape)
        elif name.startswith("fc."):
            array = draw.uniform(-1, 1, shape) / math.sqrt(_WIDTHS[-1])
        else:
            array = np.full(shape, 1.0 if name.endswith(("weight", "running_var")) else 0.0)
        tensors[name] = array.astype(np.float32)
    return Weights(tensors)
