"""Codecs that send the largest changes of the whole model alone; all others are left over. Pure.

    topk     i U8[gaps]   v F32[count]                   change = v at the positions in i, else 0
    ternary  b U8[bytes]  g U8[gaps]  s F32[rows]        change = scale of its row at the positions
             q I8[n]      l I32[chunks]                  in g, minus where the bit is set, else 0;
                                                         of small tensors q * scale of its row

Positions are `gaps`; those of a ternary update are deflated in chunks that are l bytes long.
Ternary: Sattler et al. 2019, arXiv 1903.02891, algorithm 1, with a scale for each row; biases and
narrow layers, on which much depends, go as int8. Early builds sent a tensor i in place of g, with
other contents: such updates are refused.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

import numpy as np
import numpy.typing as npt

from protocols.codecs.delta import BLOCK, Block, Changes, Field, Floats, Layout
from protocols.codecs.dense import Opened, OpenedInt8, Quantiser, Sink, check_scales
from protocols.codecs.index_coding import (
    GapReader,
    GapWriter,
    Positions,
    deflated,
    most_deflated,
    most_gaps,
)
from protocols.errors import BadWeights
from protocols.model.weights import Array, Part, Readable, Schema, TensorSpec

#: Low bits of a float32 that its class of sizes has not: a class is 1/256 wide, or less.
_DROPPED = 15


class TopK:
    """The largest changes, exact."""

    def __init__(self, share: float) -> None:
        self.share = share

    def schema(self, layout: Layout) -> Schema:
        most = _most(self.share, layout.count)
        gaps = most_gaps(most, layout.count)
        return {"i": TensorSpec("U8", (gaps,)), "v": TensorSpec("F32", (most,))}

    def encode(self, changes: Changes, to: Sink) -> None:
        chosen = _Chosen(changes, self.share)
        gaps = chosen.gaps()
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
    """The largest changes, up or down by the mean size of those of their row; small tensors as
    int8."""

    def __init__(self, share: float) -> None:
        self.share = share

    def schema(self, layout: Layout) -> Schema:
        return self._schema(layout, _Small(layout))

    def _schema(self, layout: Layout, small: _Small) -> Schema:
        most = _most(self.share, layout.count - small.count)
        longest, chunks = most_deflated(most_gaps(most, layout.count))
        return {
            "b": TensorSpec("U8", (-(-most // 8),)),
            "g": TensorSpec("U8", (longest,)),
            "l": TensorSpec("I32", (chunks,)),
            "q": TensorSpec("I8", (small.count,)),
            "s": TensorSpec("F32", (layout.rows,)),
        }

    def encode(self, changes: Changes, to: Sink) -> None:
        small = _Small(changes.layout)
        chosen = _Chosen(changes, self.share, small)
        bits = np.packbits(np.signbit(chosen.values))
        gaps, chunks = deflated(chosen.gaps())
        lengths = {"b": len(bits), "g": len(gaps), "l": len(chunks)}
        to.begin(
            {
                name: TensorSpec(spec.dtype, (lengths.get(name, *spec.shape),))
                for name, spec in self._schema(changes.layout, small).items()
            }
        )
        to.put("b", bits)
        to.put("g", gaps)
        to.put("l", chunks)
        scales = [np.empty(0, np.float32)]
        whole = Quantiser()
        for block in changes.blocks(lambda field: field.row):
            if block.field.name in small.fields:
                steps, scale = whole.quantise(block)
                to.put("q", steps)
            else:
                scale = _scaled(block, chosen.within(block))
            scales.append(scale)
            to.keep(block.change)
        to.put("s", np.concatenate(scales))

    def open(self, file: Readable, layout: Layout) -> Opened:
        small = _Small(layout)
        schema = self._schema(layout, small)
        _check_schema(file, schema)
        if any(file.schema[name] != schema[name] for name in ("q", "s")):
            raise BadWeights(f"not the scales of {layout.rows} rows, or not the small tensors")
        check_scales(file, layout.rows)
        gaps = GapReader(file, "g", layout.count, "l")
        if gaps.count > (most := _most(self.share, layout.count - small.count)):
            raise BadWeights(f"{gaps.count} positions, but {most} at most")
        return _OpenedTernary(file, gaps, small)


class _OpenedTernary:
    def __init__(self, file: Readable, gaps: GapReader, small: _Small) -> None:
        self._file, self._gaps, self._small = file, gaps, small
        self._steps = OpenedInt8(file)
        count, nbytes = gaps.count, file.schema["b"].nbytes
        if nbytes != -(-count // 8):
            raise BadWeights(f"{count} positions, but not as many signs")
        if count % 8 and self._bits(nbytes - 1, nbytes)[count % 8 :].any():
            raise BadWeights("signs beyond the last position")

    def _bits(self, first: int, last: int) -> Array:
        return np.unpackbits(np.asarray(self._file.read(Part("b", first, last)), np.uint8))

    def change(self, field: Field, start: int, stop: int, out: Floats) -> None:
        if (among := self._small.fields.get(field.name)) is not None:
            self._steps.change(among, start, stop, out)
            return
        before, positions = self._gaps.between(field.start + start, field.start + stop)
        out[:] = 0
        if not len(positions):
            return
        after = before + len(positions)
        minus = self._bits(before // 8, -(-after // 8))[before % 8 :][: len(positions)]
        rows = (positions - field.start) // field.row
        first, last = field.first_row + int(rows[0]), field.first_row + int(rows[-1]) + 1
        scale = np.asarray(self._file.read(Part("s", first, last)), np.float32)[rows - rows[0]]
        out[positions - (field.start + start)] = np.where(minus, -scale, scale)


def _scaled(block: Block, here: Positions) -> Floats:
    """The scale of each row of a block; `here`, its chosen elements keep what is left of them."""
    change, row = block.change, block.field.row
    sizes, of = np.abs(change[here]), here // row
    count = -(-len(change) // row)
    sums = np.bincount(of, sizes, minlength=count)
    scale = (sums / np.maximum(np.bincount(of, minlength=count), 1)).astype(np.float32)
    change[here] -= np.copysign(scale[of], change[here])
    return scale


class _Small:
    """The smallest tensors, together at most a fiftieth of the model; their places among each
    other."""

    def __init__(self, layout: Layout) -> None:
        self.fields: dict[str, Field] = {}
        self.count = 0
        total, names = 0, set()
        for field in sorted(layout.fields.values(), key=lambda field: field.size):
            total += field.size
            if total * 50 > layout.count:
                break
            names.add(field.name)
        for name, field in layout.fields.items():
            if name in names:
                self.fields[name] = field._replace(start=self.count)
                self.count += field.size


def _most(share: float, count: int) -> int:
    """How many of so many elements may be sent."""
    return math.ceil(count * share)


def _check_schema(file: Readable, most: Schema) -> None:
    """Raise BadWeights unless the file has these tensors, at most as long."""
    found = file.schema
    kinds = [(name, spec.dtype, len(spec.shape)) for name, spec in sorted(found.items())]
    if kinds != [(name, spec.dtype, 1) for name, spec in most.items()] or any(
        found[name].nbytes > most[name].nbytes for name in most
    ):
        raise BadWeights(
            f"not this codec's tensors, at most as long as {most}: does the sender run another "
            "version of commonweight?"
        )


class _Chosen:
    """The largest changes, never a 0: ascending `positions` on the flat axis, and `values`.

    Those of `small` tensors do not count.
    """

    def __init__(self, changes: Changes, share: float, small: _Small | None = None) -> None:
        skipped = small.fields if small else {}
        most = _most(share, changes.layout.count - (small.count if small else 0))
        least = _cut(changes, most, skipped)
        where: list[Positions] = [np.empty(0, np.int64)]
        values: list[Floats] = [np.empty(0, np.float32)]
        for block in _without(skipped, changes):
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

    def gaps(self) -> npt.NDArray[np.uint8]:
        writer = GapWriter()
        starts = range(0, max(len(self.positions), 1), BLOCK)
        return np.concatenate([writer.encode(self.positions[at : at + BLOCK]) for at in starts])


def _size(change: Floats) -> npt.NDArray[np.uint32]:
    """Numbers that are in the order of the sizes: a float without its sign, as bits."""
    return change.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _without(skipped: Container[str], changes: Changes) -> Iterator[Block]:
    return (block for block in changes.blocks() if block.field.name not in skipped)


def _cut(changes: Changes, most: int, skipped: Container[str]) -> int:
    """The largest class of sizes so that it and those above have `most` elements, or all."""
    counts = np.zeros(1 << (31 - _DROPPED), np.int64)
    for block in _without(skipped, changes):
        classes = (_size(block.change) >> _DROPPED).astype(np.intp)  # else bincount does it, slowly
        counts += np.bincount(classes, minlength=len(counts))
    from_above = np.cumsum(counts[::-1])
    return max(len(counts) - 1 - int(np.searchsorted(from_above, most)), 0)
