"""Updates of adapters as two matrices a layer, whose product is what counts. Pure numpy.

An update of a layer `L` holds `L.lora_A.weight` F32[r, in] and `L.lora_B.weight` F32[out, r]: its
value is BA, float32[out, in]. The rank r may differ from peer to peer and layer to layer. What
the peers add up is BA, never A and B. A version holds for each layer either

    L.delta          F32[out, in]          the sum of all products so far, to which updates add
    L.lora_A.weight  F32[R, in], and       factors of the product, which updates replace
    L.lora_B.weight  F32[out, R]

and tensors beside the adapters, such as the head of a classification, which updates hold whole.
`Products` shows factors as dense tensors `L.delta`, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.model.weights import Array, Part, Schema, TensorSpec, WeightReader, header_bytes

A, B, DELTA = ".lora_A.weight", ".lora_B.weight", ".delta"
#: The largest rank that a run may have, and that of `rank=auto`.
MAX_RANK, AUTO_RANK = 1024, 32
#: Elements of the parts in which factors are read, about.
_ROWS = 1 << 18

Matrix = npt.NDArray[np.float32]


class Sides(NamedTuple):
    """Outputs and inputs of a layer: those of its product."""

    out: int
    inputs: int


def layers(version: Schema) -> dict[str, Sides]:
    """The layers with adapters in a version, in name order. Raises BadWeights."""
    found: dict[str, Sides] = {}
    for name, (dtype, shape) in sorted(version.items()):
        if name.endswith((DELTA, A)) and (dtype, len(shape)) != ("F32", 2):
            raise BadWeights(f"the tensor {name!r} is no matrix of float32")
        if name.endswith(DELTA):
            found[name.removesuffix(DELTA)] = Sides(*shape)
        elif name.endswith(A):
            layer = name.removesuffix(A)
            other = version.get(layer + B, TensorSpec("", (0, 0)))
            if (other.dtype, other.shape[1:]) != ("F32", shape[:1]):
                raise BadWeights(f"the layer {layer!r} has no two factors of one rank")
            found[layer] = Sides(other.shape[0], shape[1])
    return found


def is_factored(version: Schema) -> bool:
    """True for a version that holds factors, not their products."""
    return any(name.endswith(A) for name in version)


def dense_schema(version: Schema) -> Schema:
    """The schema of a version with a product in place of each two factors."""
    rest = {name: spec for name, spec in version.items() if not name.endswith((A, B))}
    of = {layer + DELTA: TensorSpec("F32", sides) for layer, sides in layers(version).items()}
    return dict(sorted({**rest, **of}.items()))


def update_schema(version: Schema, rank: int) -> Schema:
    """The schema of an update of a version, with this rank in all layers."""
    whole = {n: spec for n, spec in version.items() if not n.endswith((A, B, DELTA))}
    for layer, (out, inputs) in layers(version).items():
        whole[layer + A] = TensorSpec("F32", (rank, inputs))
        whole[layer + B] = TensorSpec("F32", (out, rank))
    return dict(sorted(whole.items()))


def max_bytes(version: Schema, rank: int) -> int:
    """The largest size of an update, with its header."""
    largest = update_schema(version, rank)
    return len(header_bytes(largest)) + sum(spec.nbytes for spec in largest.values())


def check_update(update: Schema, version: Schema, most: int) -> None:
    """Raise BadWeights unless an update has this version's layers, by ranks from 1 to `most`."""
    expected = update_schema(version, most)
    if update.keys() != expected.keys():
        odd = min(update.keys() ^ expected.keys())
        raise BadWeights(f"the adapters are not those of this run: {odd!r}")
    ranks = {layer: update[layer + A].shape[:1] for layer in layers(version)}
    for name, spec in expected.items():
        layer = name[: -len(A)]
        shape = spec.shape
        if name.endswith((A, B)) and ranks[layer] and 1 <= ranks[layer][0] <= most:
            (rank,) = ranks[layer]
            shape = (rank, shape[1]) if name.endswith(A) else (shape[0], rank)
        if update[name] != TensorSpec(spec.dtype, shape):
            raise BadWeights(
                f"the tensor {name!r} is {update[name].dtype}{list(update[name].shape)}: not "
                f"{spec.dtype}{list(spec.shape)}, nor the same with a rank below {most}"
            )


def read_factors(file: WeightReader, layer: str) -> tuple[Matrix, Matrix]:
    """A float32[r, in] and B float32[out, r] of a layer."""
    a, b = (_whole(file, layer + name) for name in (A, B))
    return a, b


def _whole(file: WeightReader, name: str) -> Matrix:
    shape = file.schema[name].shape
    return np.asarray(file.read(Part(name, 0, shape[0] * shape[1])), np.float32).reshape(shape)


class Products:
    """Weights with factors, read as if they held the products: `L.delta` for each layer.

    A layer's A is in memory, and the rows of B that a part needs.
    """

    def __init__(self, file: WeightReader, schema: Schema | None = None) -> None:
        self.schema = schema or dense_schema(file.schema)
        self.file = file
        self._a: tuple[str, npt.NDArray[np.float64]] = ("", np.empty((0, 0)))

    def read(self, part: Part) -> Array:
        """The elements of a part, flat; of a product in float32."""
        if part.name in self.file.schema:
            return self.file.read(part)
        layer, (_, inputs) = part.name.removesuffix(DELTA), self.schema[part.name].shape
        if self._a[0] != layer:
            self._a = layer, _whole(self.file, layer + A).astype(np.float64)
        a = self._a[1]
        out = np.empty(part.stop - part.start, np.float32)
        for first, last in _rows(part, inputs):
            rows = Part(layer + B, first * len(a), last * len(a))
            b = np.asarray(self.file.read(rows), np.float64).reshape(-1, len(a))
            with np.errstate(over="ignore", invalid="ignore"):  # the caller rejects such values
                product = (b @ a).astype(np.float32).reshape(-1)
            start, stop = max(part.start, first * inputs), min(part.stop, last * inputs)
            out[start - part.start : stop - part.start] = product[
                start - first * inputs : stop - first * inputs
            ]
        return out


def _rows(part: Part, width: int) -> Iterator[tuple[int, int]]:
    """Rows that hold the part's elements, some at a time."""
    end, step = -(-part.stop // width), max(1, _ROWS // width)
    for first in range(part.start // width, end, step):
        yield first, min(first + step, end)
