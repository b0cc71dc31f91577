"""The encoding `sparse2`: of each chunk of a tensor the largest changes, with two bits each. Pure.

    c U8[bytes]   s BF16[2 * chunks]        change = plus or minus one of its chunk's two levels

Sarfi et al. 2025, arXiv 2508.15706 (SparseLoCo): top-k by chunk, values of two bits, error feedback
instead of an outer momentum. A chunk has 4,096 elements, or what is left of its tensor. Of m
elements, k = ceil(K * m / 4096) are sent, by these bits, with zeros up to a whole byte:

    positions   k * l bits                 the low l = floor(log2(m / k)) bits of each
                k + ((m - 1) >> l) bits    bit (position >> l) + i is set for the i-th (Elias 1974)
    values      k bits                     1 if the change is negative
                k bits                     1 if its size is the second level

So the size of a file follows from the model alone, and a set of positions has one spelling. The
levels are the mean sizes of the changes up to the mean size, and of those above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.codecs.delta import BLOCK_ELEMENTS, DeltaReader, FlatLayout, FlatTensor, Floats
from protocols.codecs.dense import Decode, Sink
from protocols.errors import BadWeights
from protocols.model.bfloat16 import bf16_to_float32, float32_to_bf16
from protocols.model.weights import (
    Part,
    Schema,
    TensorSpec,
    WeightReader,
    check_schema,
)

CHUNK = 4096

Bits = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]


class _Shape(NamedTuple):
    """The bits of chunks of `size` elements of which `sent` are sent."""

    size: int
    sent: int

    @classmethod
    def of(cls, size: int, count: int) -> _Shape:
        """`count`: of a whole chunk."""
        return cls(size, -(-count * size // CHUNK))

    @property
    def low(self) -> int:
        """Bits of a position that are written as they are."""
        return (self.size // self.sent).bit_length() - 1

    @property
    def high(self) -> int:
        """Bits of the row in which each position sets one."""
        return self.sent + (self.size - 1 >> self.low)

    @property
    def bits(self) -> int:
        return self.sent * (self.low + 2) + self.high

    @property
    def nbytes(self) -> int:
        return -(-self.bits // 8)


class _Run(NamedTuple):
    """Chunks of one shape, one after the other: elements `start`…`stop` of a tensor."""

    shape: _Shape
    start: int
    stop: int
    first_chunk: int
    first_byte: int

    @property
    def chunks(self) -> int:
        return (self.stop - self.start) // self.shape.size

    def slice(self, start: int, stop: int) -> _Run | None:
        """The chunks that have elements in `start`…`stop`."""
        size = self.shape.size
        first = max(start - self.start, 0) // size
        last = -(-(min(stop, self.stop) - self.start) // size)
        if first >= last:
            return None
        return _Run(
            self.shape,
            self.start + first * size,
            self.start + last * size,
            self.first_chunk + first,
            self.first_byte + first * self.shape.nbytes,
        )


class _Chunks:
    """Where the chunks of each tensor are: whole ones, then what is left."""

    def __init__(self, layout: FlatLayout, count: int) -> None:
        self.runs: dict[str, tuple[_Run, ...]] = {}
        self.chunks = self.nbytes = 0
        for field in layout.fields.values():
            whole = field.size // CHUNK * CHUNK
            bounds = ((0, whole, CHUNK), (whole, field.size, field.size - whole))
            self.runs[field.name] = tuple(
                self._next(_Shape.of(size, count), start, stop)
                for start, stop, size in bounds
                if start < stop
            )

    def _next(self, shape: _Shape, start: int, stop: int) -> _Run:
        run = _Run(shape, start, stop, self.chunks, self.nbytes)
        self.chunks += run.chunks
        self.nbytes += run.chunks * shape.nbytes
        return run

    def within(self, field: FlatTensor, start: int, stop: int) -> Iterator[_Run]:
        for run in self.runs[field.name]:
            if (here := run.slice(start, stop)) is not None:
                yield here


class Sparse2:
    """Of each chunk of 4,096 changes the `count` largest, with two bits each."""

    def __init__(self, count: int) -> None:
        self.count = count

    def schema(self, layout: FlatLayout) -> Schema:
        return _schema(_Chunks(layout, self.count))

    def encode(self, changes: DeltaReader, to: Sink) -> None:
        where = _Chunks(changes.layout, self.count)
        to.begin(_schema(where))
        levels = [np.empty(0, np.uint16)]
        for block in changes.blocks(lambda field: CHUNK):
            for run in where.within(block.field, block.start, block.stop):
                here = block.change[run.start - block.start : run.stop - block.start]
                coded, level = _encode(here.reshape(-1, run.shape.size), run.shape)
                to.put("c", coded)
                levels.append(level)
            to.put_residual(block.change)
        to.put("s", np.concatenate(levels))

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        where = _Chunks(layout, self.count)
        check_schema(file.schema, _schema(where))
        for field in layout.fields.values():  # all of it is checked before any of it is used
            for start in range(0, field.size, BLOCK_ELEMENTS):
                for run in where.within(field, start, min(start + BLOCK_ELEMENTS, field.size)):
                    _decode(file, run)

        def decode(field: FlatTensor, start: int, stop: int, out: Floats) -> None:
            out[:] = 0
            for run in where.within(field, start, stop):
                chunk, positions, values = _decode(file, run)
                places = (run.start + chunk * run.shape.size + positions).reshape(-1)
                first, last = np.searchsorted(places, (start, stop))
                out[places[first:last] - start] = values.reshape(-1)[first:last]

        return decode


def _schema(where: _Chunks) -> Schema:
    return {
        "c": TensorSpec("U8", (where.nbytes,)),
        "s": TensorSpec("BF16", (2 * where.chunks,)),
    }


def _encode(rows: Floats, shape: _Shape) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """The bytes and levels of chunks, float32[n, size], whose residual replaces them."""
    size, count = shape.size, shape.sent
    sizes = np.abs(rows)
    positions = np.sort(np.argpartition(sizes, size - count, axis=1)[:, size - count :], axis=1)
    sizes = np.take_along_axis(sizes, positions, 1)
    values = np.take_along_axis(rows, positions, 1)
    # An element that does not change stays as it is: if one is chosen, the first level is 0.
    cut = np.where(sizes.min(1) > 0, sizes.mean(1, dtype=np.float64), 0)[:, None]
    above = sizes > cut
    levels = np.zeros((len(rows), 2))
    for number, group in enumerate((~above, above)):
        sums = np.where(group, sizes, 0).sum(1, dtype=np.float64)
        levels[:, number] = sums / np.maximum(group.sum(1), 1)
    levels[:, 1] = np.maximum(levels[:, 1], levels[:, 0])
    coded = float32_to_bf16(levels.astype(np.float32))
    sent = np.copysign(_level(coded, above), values)
    np.put_along_axis(rows, positions, values - sent, 1)
    return _pack(positions, np.signbit(values), above, shape), coded.reshape(-1)


def _level(coded: npt.NDArray[np.uint16], above: Bits) -> Floats:
    """The size of each change, float32[n, count], of the levels uint16[n, 2]."""
    return np.take_along_axis(bf16_to_float32(coded), above.astype(np.intp), 1)


def _pack(positions: Positions, minus: Bits, above: Bits, shape: _Shape) -> npt.NDArray[np.uint8]:
    low, high = shape.low, shape.high
    lows = (positions[:, :, None] >> np.arange(low)) & 1
    marks = np.zeros((len(positions), high), np.bool_)
    np.put_along_axis(marks, (positions >> low) + np.arange(shape.sent), True, 1)
    bits = np.concatenate(
        [lows.reshape(len(positions), -1).astype(np.bool_), marks, minus, above], 1
    )
    return np.packbits(bits, axis=1).reshape(-1)


def _decode(file: WeightReader, run: _Run) -> tuple[Positions, Positions, Floats]:
    """Numbers of chunks int64[n, 1], positions int64[n, count] in them, and the changes
    float32[n, count]. Raises BadWeights."""
    shape, chunks = run.shape, run.chunks
    part = Part("c", run.first_byte, run.first_byte + chunks * shape.nbytes)
    bits = np.unpackbits(np.asarray(file.read(part), np.uint8).reshape(chunks, -1), axis=1)
    ends = np.cumsum([shape.sent * shape.low, shape.high, shape.sent, shape.sent])
    lows, marks, minus, above, rest = np.split(bits.astype(np.bool_), ends, axis=1)
    if rest.any() or (marks.sum(1) != shape.sent).any():
        raise BadWeights(f"a chunk has not {shape.sent} positions")
    highs = np.nonzero(marks)[1].reshape(chunks, -1) - np.arange(shape.sent)
    weight = 1 << np.arange(shape.low)
    positions = (highs << shape.low) + lows.reshape(chunks, shape.sent, -1) @ weight
    if (positions[:, -1] >= shape.size).any() or (np.diff(positions, axis=1) <= 0).any():
        raise BadWeights("the positions of a chunk do not ascend, or one is beyond its end")
    first = 2 * run.first_chunk
    coded = np.asarray(file.read(Part("s", first, first + 2 * chunks)), np.uint16).reshape(-1, 2)
    levels = bf16_to_float32(coded)
    if not ((levels[:, 0] >= 0) & (levels[:, 0] <= levels[:, 1]) & np.isfinite(levels[:, 1])).all():
        raise BadWeights("the levels of a chunk are not two finite numbers that ascend from 0")
    sizes = _level(coded, above)
    return np.arange(chunks)[:, None], positions, np.where(minus, -sizes, sizes)
