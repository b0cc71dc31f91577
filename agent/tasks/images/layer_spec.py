"""Small networks over pictures, declared in a line of text, alike in every framework. Pure numpy.

    conv 32 5, pool, conv 64 5, pool, dense 512

`conv N K` is N filters of K by K (odd) with zeros around, then ReLU; `pool` the largest of 2 by 2;
`dense N` N units, then ReLU; what comes before the first of them is made flat. `conv N K norm` and
`dense N norm` normalise over the batch before the ReLU, and have no other bias than the norm's
(Ioffe and Szegedy 2015, arXiv 1502.03167). A last dense layer with a unit for each class is always
there. Tensors are named and laid out as PyTorch has them, `weight` as [out, in] or [out, in, K, K],
pictures as [channel, row, column]: that is the form in which they travel. `to_keras` and
`from_keras` convert to the layout of Keras and back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from protocols.errors import UsageError
from protocols.model.weights import Array, Schema, TensorSpec, Weights

_LAYER = re.compile(r"conv (\d+) (\d+)( norm)?|pool|dense (\d+)( norm)?")
_EXAMPLE = "such as 'conv 32 3, pool, dense 64', or 'conv 32 3 norm'"
_STATISTICS = ("norm.running_mean", "norm.running_var")
#: The tensors of a layer, in Keras' order.
_PLAIN = ("weight", "bias")
_NORMED = ("weight", "norm.weight", "norm.bias", *_STATISTICS)
_MOST = 4096


class Layer(NamedTuple):
    """One layer. `units` are its outputs or filters, `given` what it gets: one number of inputs, or
    channels, rows and columns; `kernel` is the side of a filter. `norm`: it is normalised."""

    name: str
    kind: Literal["conv", "pool", "dense", "output"]
    input_shape: tuple[int, ...]
    units: int = 0
    kernel: int = 0
    norm: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors, after its own."""
        return () if self.kind == "pool" else _NORMED if self.norm else _PLAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """That of its weight; empty for a pool."""
        if self.kind == "pool":
            return ()
        if self.kind == "conv":
            return (self.units, self.input_shape[0], self.kernel, self.kernel)
        return (self.units, math.prod(self.input_shape))


def parse_layers(text: str, channels: int, size: int, classes: int) -> tuple[Layer, ...]:
    """The layers that `text` declares for pictures of `size` by `size`. Raises UsageError."""
    layers: list[Layer] = []
    given: tuple[int, ...] = (channels, size, size)
    for number, words in enumerate(text.split(","), 1):
        words = " ".join(words.split())
        match = _LAYER.fullmatch(words)
        if not match:
            raise UsageError(f"{words!r} is no layer", _EXAMPLE)
        if words == "pool":
            if len(given) != 3 or given[1] < 2:
                raise UsageError(f"layer {number} has nothing left to pool", "a larger size")
            layers.append(Layer(f"pool{number}", "pool", given))
            given = (given[0], given[1] // 2, given[2] // 2)
        elif match[1]:
            units, kernel = _count(match[1]), _count(match[2])
            if len(given) != 3 or kernel % 2 == 0:
                raise UsageError(f"layer {number} cannot be {words!r}", _EXAMPLE)
            layers.append(Layer(f"conv{number}", "conv", given, units, kernel, bool(match[3])))
            given = (units, *given[1:])
        else:
            units, norm = _count(match[4]), bool(match[5])
            layers.append(Layer(f"dense{number}", "dense", given, units, norm=norm))
            given = (units,)
    return (*layers, Layer("output", "output", given, classes))


def _count(digits: str) -> int:
    number = int(digits)
    if not 1 <= number <= _MOST:
        raise UsageError(f"a layer cannot have {number} units", f"from 1 to {_MOST}")
    return number


def schema(layers: Sequence[Layer]) -> Schema:
    """Tensors of all layers, float32."""
    return {
        f"{layer.name}.{part}": TensorSpec(
            "F32", layer.shape if part == "weight" else (layer.units,)
        )
        for layer in layers
        for part in layer.parts
    }


def init(layers: Sequence[Layer], draw: np.random.RandomState) -> Weights:
    """First weights: uniform with variance 2 / fan-in (He et al. 2015, arXiv 1502.01852), biases 0;
    norms that change nothing.

    Smaller before the logits, so that all classes begin with nearly equal probabilities. The bytes
    are the same for every framework.
    """
    tensors: dict[str, Array] = {}
    for layer in _with_weights(layers):
        bound = math.sqrt((0.1 if layer.kind == "output" else 6) / math.prod(layer.shape[1:]))
        weight = draw.uniform(-bound, bound, layer.shape)
        tensors[f"{layer.name}.weight"] = weight.astype(np.float32)
        for part in layer.parts[1:]:
            fill = 1 if part in ("norm.weight", "norm.running_var") else 0
            tensors[f"{layer.name}.{part}"] = np.full(layer.units, fill, np.float32)
    return Weights(tensors)


def to_keras(layers: Sequence[Layer], weights: Mapping[str, Array]) -> list[Array]:
    """The tensors in Keras' order and layout: for each layer its kernel, then its bias or norm.

    A filter is [K, K, in, out] there, a dense kernel [in, out], and pictures are [row, column,
    channel]: so the first dense kernel's inputs come in another order too.
    """
    made: list[Array] = []
    for layer in _with_weights(layers):
        weight = np.asarray(weights[f"{layer.name}.weight"])
        if layer.kind == "conv":
            kernel = weight.transpose(2, 3, 1, 0)
        elif len(layer.input_shape) == 3:
            kernel = weight.reshape(layer.units, *layer.input_shape).transpose(2, 3, 1, 0)
            kernel = kernel.reshape(-1, layer.units)
        else:
            kernel = weight.T
        made.append(np.ascontiguousarray(kernel))
        for part in layer.parts[1:]:
            array = np.asarray(weights[f"{layer.name}.{part}"])
            # A codec may have brought a variance below 0.
            made.append(np.maximum(array, 0) if part == "norm.running_var" else array)
    return made


def from_keras(layers: Sequence[Layer], arrays: Sequence[Array]) -> Weights:
    """The inverse of `to_keras`."""
    tensors: dict[str, Array] = {}
    found = iter(arrays)
    for layer in _with_weights(layers):
        kernel = np.asarray(next(found))
        if layer.kind == "conv":
            weight = kernel.transpose(3, 2, 0, 1)
        elif len(layer.input_shape) == 3:
            channels, rows, columns = layer.input_shape
            weight = kernel.reshape(rows, columns, channels, layer.units).transpose(3, 2, 0, 1)
            weight = weight.reshape(layer.units, -1)
        else:
            weight = kernel.T
        tensors[f"{layer.name}.weight"] = np.ascontiguousarray(weight)
        for part in layer.parts[1:]:
            tensors[f"{layer.name}.{part}"] = np.asarray(next(found))
    return Weights(tensors)


def _with_weights(layers: Sequence[Layer]) -> Iterator[Layer]:
    return (layer for layer in layers if layer.kind != "pool")
