"""What training changed, as one long row of float32 numbers, block by block. Pure numpy.

All floating-point tensors of a model, in name order, are the flat axis of a `Layout`, but for those
that follow from the others (`schemes.is_derived`). A block fits a core's cache, and its buffer is
used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.model import personalization
from protocols.model.weights import (
    DTYPES,
    FLOAT_DTYPES,
    Array,
    Part,
    Schema,
    WeightReader,
    bf16_to_float32,
    float32_to_bf16,
)

Floats = npt.NDArray[np.float32]

#: Elements that are worked on at a time; also the longest row of int8.
BLOCK_ELEMENTS = 64 * 1024
#: Rows of int8 that are shorter are joined: the scale has four bytes.
_MIN_ROW = 512
#: A change beyond this is no training any more, and its rounding could overflow.
MAX_CHANGE = 1e38


class FlatTensor(NamedTuple):
    """A floating-point tensor: its place on the flat axis, its rows of int8, its bytes of bits."""

    name: str
    number: int
    dtype: str
    size: int
    start: int
    row: int
    first_row: int
    first_byte: int


class FlatLayout:
    """Where each floating-point tensor of a schema that travels up lies on the flat axis."""

    def __init__(self, schema: Schema) -> None:
        self.fields: dict[str, FlatTensor] = {}
        start = rows = nbytes = 0
        for name in sorted(schema):
            dtype, shape = schema[name]
            count = math.prod(shape)
            if dtype in FLOAT_DTYPES and count and not personalization.is_derived(name):
                row = _row_length(shape)
                number = len(self.fields)
                self.fields[name] = FlatTensor(name, number, dtype, count, start, row, rows, nbytes)
                start, rows, nbytes = start + count, rows - (-count // row), nbytes - (-count // 8)
        self.count, self.rows, self.sign_bytes = start, rows, nbytes


def _row_length(shape: tuple[int, ...]) -> int:
    """Elements that share a scale: what leads to one output, or several of such."""
    row = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    return min(row * -(-_MIN_ROW // row), BLOCK_ELEMENTS)


class DeltaBlock(NamedTuple):
    """Elements `start` to `stop` of a tensor and their change, in a buffer that is used again."""

    field: FlatTensor
    start: int
    stop: int
    change: Floats


class DeltaReader:
    """What an update changes: trained - base + what was left over before, block by block.

    `left` holds the leftover as one tensor over the flat axis, named `key`.
    """

    def __init__(
        self, trained: WeightReader, base: WeightReader, left: WeightReader | None, key: str
    ) -> None:
        self.layout = FlatLayout(base.schema)
        self._trained, self._base, self._left, self._key = trained, base, left, key
        self._buffer = np.empty(BLOCK_ELEMENTS, np.float32)

    def blocks(self, unit: Callable[[FlatTensor], int] = lambda field: 1) -> Iterator[DeltaBlock]:
        """All of it, in order; a block is whole units of its tensor but for the last one.

        Raises BadWeights where the change is not finite.
        """
        for field in self.layout.fields.values():
            step = BLOCK_ELEMENTS // unit(field) * unit(field)
            for start in range(0, field.size, step):
                stop = min(start + step, field.size)
                part = Part(field.name, start, stop)
                change = self._buffer[: stop - start]
                with np.errstate(over="ignore", invalid="ignore"):
                    new, old = self._trained.read(part), self._base.read(part)
                    subtract(new, old, field.dtype, change)
                    if self._left is not None:
                        at = field.start
                        before = self._left.read(Part(self._key, at + start, at + stop))
                        change += np.asarray(before, np.float32)
                    if not (change.max() <= MAX_CHANGE and change.min() >= -MAX_CHANGE):
                        raise BadWeights(f"tensor {field.name!r} moved to NaN, infinity or near it")
                yield DeltaBlock(field, start, stop, change)


def subtract(new: Array, old: Array, dtype: str, out: Floats) -> None:
    """`new - old` in float32 for elements of a floating-point dtype."""
    if dtype == "BF16":
        new, old = bf16_to_float32(new), bf16_to_float32(old)
    elif dtype == "F16":
        new, old = new.astype(np.float32), old.astype(np.float32)
    np.subtract(new, old, out=out, casting="same_kind")


def add(old: Array, change: Floats, dtype: str) -> Array:
    """`old + change` in the elements' own dtype. May overwrite `change`."""
    with np.errstate(over="ignore"):
        if dtype == "F32":
            return np.add(change, old, out=change)
        if dtype == "BF16":
            return float32_to_bf16(bf16_to_float32(old) + change)
        return np.add(old, change, dtype=np.float64).astype(DTYPES[dtype])
