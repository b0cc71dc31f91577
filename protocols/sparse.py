"""Codecs that send the largest changes of the whole model alone; all others are left over. Pure.

    topk     i U8[gaps]   v F32[count]                   change = v at the positions in i, else 0
    ternary  b U8[bytes]  i U8[gaps]  s F32[tensors]     change = scale of its tensor at the
             positions in i, minus where the bit is set, else 0

Positions are gaps (see there) of a byte each; in a ternary update of which every twentieth element
or more is sent, of half a byte. Ternary: Sattler et al. 2019, arXiv 1903.02891, algorithm 1, with a
scale for each tensor.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from protocols.changes import BLOCK, Block, Changes, Field, Floats, Layout
from protocols.codings import Opened, Sink, check_scales
from protocols.errors import BadWeights
from protocols.gaps import BYTE, NIBBLE, GapReader, GapWriter, Positions, packed
from protocols.weights import Array, Part, Readable, Schema, TensorSpec

#: From this share on, half a byte for a gap is fewer bytes than a whole one.
_DENSE = 0.05
#: Low bits of a float32 that its class of sizes has not: a class is 1/256 wide, or less.
_DROPPED = 15


class TopK:
    """The largest changes, exact."""

    def __init__(self, share: float) -> None:
        self.share = share

    def schema(self, layout: Layout) -> Schema:
        most = _most(self.share, layout)
        return {"i": _gaps_schema(most, layout, BYTE), "v": TensorSpec("F32", (most,))}

    def encode(self, changes: Changes, to: Sink) -> None:
        chosen = _Chosen(changes, self.share)
        gaps = chosen.gaps(BYTE)
        count = len(chosen.positions)
        to.begin({"i": TensorSpec("U8", (len(gaps),)), "v": TensorSpec("F32", (count,))})
        to.put("i", gaps)
        to.put("v", chosen.values)
        for block in changes.blocks():
            block.change[chosen.within(block)] = 0
            to.keep(block.change)

    def open(self, file: Readable, layout: Layout) -> Opened:
        _check_schema(file, self.schema(layout))
        return _OpenedTopK(file, layout)


class _OpenedTopK:
    def __init__(self, file: Readable, layout: Layout) -> None:
        self._file = file
        self._gaps = GapReader(file, "i", layout.count)
        if self._gaps.count * 4 != file.schema["v"].nbytes:
            raise BadWeights(f"{self._gaps.count} positions, but not as many values")

    def change(self, field: Field, start: int, stop: int, out: Floats) -> None:
        before, positions = self._gaps.between(field.start + start, field.start + stop)
        out[:] = 0
        if len(positions):
            values = self._file.read(Part("v", before, before + len(positions)))
            out[positions - (field.start + start)] = values


class Ternary:
    """The largest changes, up or down by the mean size of those of their tensor."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._top = NIBBLE if share >= _DENSE else BYTE

    def schema(self, layout: Layout) -> Schema:
        most = _most(self.share, layout)
        return {
            "b": TensorSpec("U8", (-(-most // 8),)),
            "i": _gaps_schema(most, layout, self._top),
            "s": TensorSpec("F32", (len(layout.fields),)),
        }

    def encode(self, changes: Changes, to: Sink) -> None:
        chosen = _Chosen(changes, self.share)
        gaps, bits = chosen.gaps(self._top), np.packbits(np.signbit(chosen.values))
        scale = np.zeros(len(changes.layout.fields), np.float32)
        for field in changes.layout.fields.values():
            first, last = np.searchsorted(chosen.positions, (field.start, field.start + field.size))
            if first < last:
                sizes = np.abs(chosen.values[first:last])
                scale[field.number] = sizes.mean(dtype=np.float64)
        shapes = {"b": ("U8", len(bits)), "i": ("U8", len(gaps)), "s": ("F32", len(scale))}
        to.begin({name: TensorSpec(dtype, (count,)) for name, (dtype, count) in shapes.items()})
        to.put("b", bits)
        to.put("i", gaps)
        to.put("s", scale)
        for block in changes.blocks():
            here = chosen.within(block)
            block.change[here] -= np.copysign(scale[block.field.number], block.change[here])
            to.keep(block.change)

    def open(self, file: Readable, layout: Layout) -> Opened:
        schema = self.schema(layout)
        _check_schema(file, schema)
        if file.schema["s"] != schema["s"]:
            raise BadWeights(f"not a scale for each of {len(layout.fields)} tensors")
        check_scales(file, len(layout.fields))
        gaps = GapReader(file, "i", layout.count, self._top)
        if gaps.count > (most := _most(self.share, layout)):
            raise BadWeights(f"{gaps.count} positions, but {most} at most")
        return _OpenedTernary(file, gaps)


class _OpenedTernary:
    def __init__(self, file: Readable, gaps: GapReader) -> None:
        self._file, self._gaps = file, gaps
        count, nbytes = gaps.count, file.schema["b"].nbytes
        if nbytes != -(-count // 8):
            raise BadWeights(f"{count} positions, but not as many signs")
        if count % 8 and self._bits(nbytes - 1, nbytes)[count % 8 :].any():
            raise BadWeights("signs beyond the last position")

    def _bits(self, first: int, last: int) -> Array:
        return np.unpackbits(np.asarray(self._file.read(Part("b", first, last)), np.uint8))

    def change(self, field: Field, start: int, stop: int, out: Floats) -> None:
        before, positions = self._gaps.between(field.start + start, field.start + stop)
        out[:] = 0
        if not len(positions):
            return
        after = before + len(positions)
        minus = self._bits(before // 8, -(-after // 8))[before % 8 :][: len(positions)]
        scale = np.asarray(self._file.read(Part("s", field.number, field.number + 1)), np.float32)
        out[positions - (field.start + start)] = np.where(minus, -scale, scale)


def _most(share: float, layout: Layout) -> int:
    """How many elements may be sent."""
    return min(layout.count, math.ceil(layout.count * share))


def _gaps_schema(most: int, layout: Layout, top: int) -> TensorSpec:
    digits = min(most + layout.count // top + 1, layout.count)
    return TensorSpec("U8", (digits if top == BYTE else -(-digits // 2),))


def _check_schema(file: Readable, most: Schema) -> None:
    """Raise BadWeights unless the file has these tensors, at most as long."""
    found = file.schema
    kinds = [(name, spec.dtype, len(spec.shape)) for name, spec in sorted(found.items())]
    if kinds != [(name, spec.dtype, 1) for name, spec in most.items()] or any(
        found[name].nbytes > most[name].nbytes for name in most
    ):
        raise BadWeights(f"not these tensors, at most as long: {most}")


class _Chosen:
    """The largest changes, never a 0: ascending `positions` on the flat axis, and `values`."""

    def __init__(self, changes: Changes, share: float) -> None:
        most = _most(share, changes.layout)
        least = _cut(changes, most)
        where: list[Positions] = [np.empty(0, np.int64)]
        values: list[Floats] = [np.empty(0, np.float32)]
        for block in changes.blocks():
            here = np.flatnonzero(_size(block.change) >= max(least << _DROPPED, 1))
            where.append(here + (block.field.start + block.start))
            values.append(block.change[here])
        self.positions, self.values = np.concatenate(where), np.concatenate(values)
        if (excess := len(self.positions) - most) > 0:
            sizes = _size(self.values)
            last = np.flatnonzero(sizes >> _DROPPED == least)
            smallest = last[np.argpartition(sizes[last], excess - 1)[:excess]]
            self.positions = np.delete(self.positions, smallest)
            self.values = np.delete(self.values, smallest)

    def within(self, block: Block) -> Positions:
        """The chosen elements of a block, by their places in it."""
        start = block.field.start
        first, last = np.searchsorted(self.positions, (start + block.start, start + block.stop))
        return self.positions[first:last] - (start + block.start)

    def gaps(self, top: int) -> Array:
        writer = GapWriter(top)
        starts = range(0, max(len(self.positions), 1), BLOCK)
        digits = [writer.encode(self.positions[at : at + BLOCK]) for at in starts]
        return packed(np.concatenate(digits), top)


def _size(change: Floats) -> npt.NDArray[np.uint32]:
    """Numbers that are in the order of the sizes: a float without its sign, as bits."""
    return change.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _cut(changes: Changes, most: int) -> int:
    """The largest class of sizes so that it and those above have `most` elements, or all."""
    counts = np.zeros(1 << (31 - _DROPPED), np.int64)
    for block in changes.blocks():
        classes = (_size(block.change) >> _DROPPED).astype(np.intp)  # else bincount does it, slowly
        counts += np.bincount(classes, minlength=len(counts))
    from_above = np.cumsum(counts[::-1])
    return max(len(counts) - 1 - int(np.searchsorted(from_above, most)), 0)
