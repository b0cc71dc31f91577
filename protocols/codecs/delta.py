"""The change from training as one flat float32 array, block by block. Pure numpy.

A `FlatLayout` concatenates all floating-point tensors of a model in name order, without those that
are computed from an update (`personalization.is_derived`). A block fits into a core's cache, and
its buffer is reused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.model import personalization
from protocols.model.bfloat16 import bf16_to_float32, float32_to_bf16, widened
from protocols.model.weights import (
    DTYPES,
    FLOAT_DTYPES,
    Array,
    Part,
    Schema,
    WeightReader,
)

Floats = npt.NDArray[np.float32]

#: Elements per block; also the longest row of int8.
BLOCK_ELEMENTS = 64 * 1024
#: Shorter rows of int8 are joined, because a scale takes four bytes.
_MIN_ROW = 512
#: A larger change comes from a diverged model, and rounding it could overflow.
MAX_CHANGE = 1e38


class FlatTensor(NamedTuple):
    """A floating-point tensor: its start on the flat axis, its rows of int8, its bytes of signs."""

    name: str
    number: int
    dtype: str
    size: int
    start: int
    row: int
    first_row: int
    first_byte: int


class FlatLayout:
    """The position of each floating-point tensor of an update on the flat axis."""

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
    """Elements that share a scale: the weights of one output, or of several outputs."""
    row = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    return min(row * -(-_MIN_ROW // row), BLOCK_ELEMENTS)


class DeltaBlock(NamedTuple):
    """Elements `start` to `stop` of a tensor and their change, in a buffer that is reused."""

    field: FlatTensor
    start: int
    stop: int
    change: Floats


class DeltaReader:
    """Reads trained - base + residual, block by block.

    `residual` has one tensor over the flat axis, named `key`: what earlier updates left out.
    """

    def __init__(
        self, trained: WeightReader, base: WeightReader, residual: WeightReader | None, key: str
    ) -> None:
        self.layout = FlatLayout(base.schema)
        self._trained, self._base, self._residual, self._key = trained, base, residual, key
        self._buffer = np.empty(BLOCK_ELEMENTS, np.float32)

    def blocks(self, unit: Callable[[FlatTensor], int] = lambda field: 1) -> Iterator[DeltaBlock]:
        """All blocks, in order. All but the last block of a tensor are multiples of its `unit`.

        Raises BadWeights if a change is not finite.
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
                    if self._residual is not None:
                        part = Part(self._key, field.start + start, field.start + stop)
                        change += np.asarray(self._residual.read(part), np.float32)
                    if not (change.max() <= MAX_CHANGE and change.min() >= -MAX_CHANGE):
                        raise BadWeights(
                            f"the change of tensor {field.name!r} is NaN, infinite or near infinity"
                        )
                yield DeltaBlock(field, start, stop, change)


def subtract(new: Array, old: Array, dtype: str, out: Floats) -> None:
    """`new - old` in float32 for elements of a floating-point dtype."""
    if dtype == "F16":
        new, old = new.astype(np.float32), old.astype(np.float32)
    new, old = widened(new, dtype), widened(old, dtype)
    np.subtract(new, old, out=out, casting="same_kind")


def add(old: Array, change: Floats, dtype: str) -> Array:
    """`old + change` in the dtype of the tensor. May overwrite `change`."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "F32":
            return np.add(change, old, out=change)
        if dtype == "BF16":
            return float32_to_bf16(bf16_to_float32(old) + change)
        return np.add(old, change, dtype=np.float64).astype(DTYPES[dtype])
