"""ResNet-18 as a function of its weights (He et al. 2015, arXiv 1512.03385), torchvision's names.

The norm after each convolution is that of groups of channels (Wu and He 2018, arXiv 1803.08494) or
of the batch; the latter keeps running statistics, which are averaged over peers like weights but
moved by no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from protocols.model.weights import Array, Schema, TensorSpec, Weights

_GROUPS = 32
_WIDTHS = (64, 128, 256, 512)
_BLOCKS = 2

Tensors = dict[str, Tensor]


class _Conv(NamedTuple):
    """A convolution without bias, and the norm after it."""

    name: str
    norm: str
    given: int
    made: int
    kernel: int
    stride: int


class _Block(NamedTuple):
    """Two convolutions and what goes around them; `around` where the shape changes."""

    first: _Conv
    second: _Conv
    around: _Conv | None


def _stem(channels: int) -> _Conv:
    return _Conv("conv1", "bn1", channels, _WIDTHS[0], 7, 2)


def _blocks() -> Iterator[_Block]:
    given = _WIDTHS[0]
    for stage, made in enumerate(_WIDTHS, 1):
        for number in range(_BLOCKS):
            name = f"layer{stage}.{number}"
            stride = 2 if stage > 1 and number == 0 else 1
            around = None
            if stride > 1:
                at = f"{name}.downsample"
                around = _Conv(f"{at}.0", f"{at}.1", given, made, 1, stride)
            yield _Block(
                _Conv(f"{name}.conv1", f"{name}.bn1", given, made, 3, stride),
                _Conv(f"{name}.conv2", f"{name}.bn2", made, made, 3, 1),
                around,
            )
            given = made


def _convs(channels: int) -> Iterator[_Conv]:
    yield _stem(channels)
    for block in _blocks():
        yield from filter(None, block)


def schema(channels: int, classes: int, norm: str) -> Schema:
    """All tensors, float32."""
    found: Schema = {}
    for conv in _convs(channels):
        found[f"{conv.name}.weight"] = TensorSpec(
            "F32", (conv.made, conv.given, conv.kernel, conv.kernel)
        )
        for part in ("weight", "bias", *(_STATISTICS if norm == "batch" else ())):
            found[f"{conv.norm}.{part}"] = TensorSpec("F32", (conv.made,))
    found["fc.weight"] = TensorSpec("F32", (classes, _WIDTHS[-1]))
    found["fc.bias"] = TensorSpec("F32", (classes,))
    return found


_STATISTICS = ("running_mean", "running_var")


def buffers(channels: int, norm: str) -> frozenset[str]:
    """Names of the running statistics."""
    if norm != "batch":
        return frozenset()
    return frozenset(f"{conv.norm}.{part}" for conv in _convs(channels) for part in _STATISTICS)


def init(channels: int, classes: int, norm: str, draw: np.random.RandomState) -> Weights:
    """First weights: normal with variance 2 / fan-out for filters, as torchvision begins."""
    tensors: dict[str, Array] = {}
    for name, (_, shape) in schema(channels, classes, norm).items():
        if len(shape) == 4:
            spread = math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
            array = draw.normal(0, spread, shape)
        elif name.startswith("fc."):
            array = draw.uniform(-1, 1, shape) / math.sqrt(_WIDTHS[-1])
        else:
            array = np.full(shape, 1.0 if name.endswith(("weight", "running_var")) else 0.0)
        tensors[name] = array.astype(np.float32)
    return Weights(tensors)


def batch_norm(x: Tensor, norm: Sequence[Tensor], training: bool) -> Tensor:
    """Batch normalisation; `norm` are scale, shift, running mean and running variance.

    The last batch of an epoch may be a single example, of which there is no variance: then the
    running statistics serve, as in an evaluation. A codec may have brought a variance below 0.
    """
    scale, shift, mean, variance = norm
    if training and x.numel() > x.shape[1]:
        return F.batch_norm(x, mean, variance, scale, shift, True)
    return F.batch_norm(x, mean, variance.clamp_min(0), scale, shift, False)


def forward(w: Tensors, x: Tensor, training: bool) -> Tensor:
    """Pictures float32[n, channels, size, size] -> logits float32[n, classes].

    In training, the running statistics are moved in place.
    """

    def normed(conv: _Conv, x: Tensor) -> Tensor:
        x = F.conv2d(x, w[f"{conv.name}.weight"], stride=conv.stride, padding=conv.kernel // 2)
        scale, shift = w[f"{conv.norm}.weight"], w[f"{conv.norm}.bias"]
        if (mean := w.get(f"{conv.norm}.running_mean")) is None:
            return F.group_norm(x, _GROUPS, scale, shift)
        variance = w[f"{conv.norm}.running_var"]
        return batch_norm(x, (scale, shift, mean, variance), training)

    x = F.max_pool2d(F.relu(normed(_stem(x.shape[1]), x)), 3, 2, 1)
    for block in _blocks():
        y = normed(block.second, F.relu(normed(block.first, x)))
        x = F.relu(y + (normed(block.around, x) if block.around else x))
    return F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])
