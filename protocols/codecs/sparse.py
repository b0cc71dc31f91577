"""The sparse encodings, which send only the largest changes of the model: topk and ternary. Pure.

    topk     i U8[gaps]   v F32[count]                   change = v at the positions in i, else 0
    ternary  b U8[bytes]  g U8[gaps]  s F32[rows]        change = scale of its row at the positions
             q I8[n]      l I32[chunks]                  in g, negative if the bit is set, else 0;
                                                         for small tensors, q * scale of its row

Positions are encoded by `index_coding`; a ternary update compresses them in chunks of l bytes.
Ternary: Sattler et al. 2019, arXiv 1903.02891, algorithm 1, with one scale per row. Small tensors
(biases, narrow layers) are sent as int8, because they matter most. Early builds sent a tensor i
instead of g, with other contents: such updates are refused.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

import numpy as np
import numpy.typing as npt

from protocols.codecs.delta import (
    BLOCK_ELEMENTS,
    DeltaBlock,
    DeltaReader,
    FlatLayout,
    FlatTensor,
    Floats,
)
from protocols.codecs.dense import Decode, Quantizer, Sink, check_scales, int8_decoder
from protocols.codecs.index_coding import (
    GapReader,
    GapWriter,
    Positions,
    deflate_chunks,
    max_deflated,
    max_gap_bytes,
)
from protocols.errors import BadWeights
from protocols.model.weights import Array, Part, Schema, TensorSpec, WeightReader

#: Low bits of a float32 that its size class ignores, so a class is at most 1/256 wide.
_DROPPED = 15


class TopK:
    """The largest changes, exactly."""

    def __init__(self, share: float) -> None:
        self.share = share

    def schema(self, layout: FlatLayout) -> Schema:
        most = _max_elements(self.share, layout.count)
        gaps = max_gap_bytes(most, layout.count)
        return {"i": TensorSpec("U8", (gaps,)), "v": TensorSpec("F32", (most,))}

    def encode(self, changes: DeltaReader, to: Sink) -> None:
        chosen = _LargestChanges(changes, self.share)
        gaps = chosen.gaps()
        count = len(chosen.positions)
        to.begin({"i": TensorSpec("U8", (len(gaps),)), "v": TensorSpec("F32", (count,))})
        to.put("i", gaps)
        to.put("v", chosen.values)
        for block in changes.blocks():
            block.change[chosen.within(block)] = 0
            to.put_residual(block.change)

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        _check_schema(file, self.schema(layout))
        gaps = GapReader(file, "i", layout.count)
        if gaps.count * 4 != file.schema["v"].nbytes:
            raise BadWeights(f"{gaps.count} positions with another number of values")

        def decode(field: FlatTensor, start: int, stop: int, out: Floats) -> None:
            before, positions = gaps.between(field.start + start, field.start + stop)
            out[:] = 0
            if len(positions):
                values = file.read(Part("v", before, before + len(positions)))
                out[positions - (field.start + start)] = values

        return decode


class Ternary:
    """The signs of the largest changes, times their mean size in the row; small tensors as int8."""

    def __init__(self, share: float) -> None:
        self.share = share

    def schema(self, layout: FlatLayout) -> Schema:
        return self._schema(layout, _SmallTensors(layout))

    def _schema(self, layout: FlatLayout, small: _SmallTensors) -> Schema:
        most = _max_elements(self.share, layout.count - small.count)
        longest, chunks = max_deflated(max_gap_bytes(most, layout.count))
        return {
            "b": TensorSpec("U8", (-(-most // 8),)),
            "g": TensorSpec("U8", (longest,)),
            "l": TensorSpec("I32", (chunks,)),
            "q": TensorSpec("I8", (small.count,)),
            "s": TensorSpec("F32", (layout.rows,)),
        }

    def encode(self, changes: DeltaReader, to: Sink) -> None:
        small = _SmallTensors(changes.layout)
        chosen = _LargestChanges(changes, self.share, small)
        bits = np.packbits(np.signbit(chosen.values))
        gaps, chunks = deflate_chunks(chosen.gaps())
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
        whole = Quantizer()
        for block in changes.blocks(lambda field: field.row):
            if block.field.name in small.fields:
                steps, scale = whole.quantize(block)
                to.put("q", steps)
            else:
                scale = _row_scales(block, chosen.within(block))
            scales.append(scale)
            to.put_residual(block.change)
        to.put("s", np.concatenate(scales))

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        small = _SmallTensors(layout)
        schema = self._schema(layout, small)
        _check_schema(file, schema)
        if any(file.schema[name] != schema[name] for name in ("q", "s")):
            raise BadWeights(f"not {layout.rows} scales, or a wrong size of the small tensors")
        check_scales(file, layout.rows)
        gaps = GapReader(file, "g", layout.count, "l")
        if gaps.count > (most := _max_elements(self.share, layout.count - small.count)):
            raise BadWeights(f"{gaps.count} positions; the maximum is {most}")
        return _ternary_decoder(file, gaps, small)


def _ternary_decoder(file: WeightReader, gaps: GapReader, small: _SmallTensors) -> Decode:
    def signs(first: int, last: int) -> Array:
        return np.unpackbits(np.asarray(file.read(Part("b", first, last)), np.uint8))

    count, nbytes = gaps.count, file.schema["b"].nbytes
    if nbytes != -(-count // 8):
        raise BadWeights(f"{count} positions with another number of signs")
    if count % 8 and signs(nbytes - 1, nbytes)[count % 8 :].any():
        raise BadWeights("bits are set beyond the last position")
    decode_small = int8_decoder(file)

    def decode(field: FlatTensor, start: int, stop: int, out: Floats) -> None:
        if (among := small.fields.get(field.name)) is not None:
            decode_small(among, start, stop, out)
            return
        before, positions = gaps.between(field.start + start, field.start + stop)
        out[:] = 0
        if not len(positions):
            return
        after = before + len(positions)
        minus = signs(before // 8, -(-after // 8))[before % 8 :][: len(positions)]
        rows = (positions - field.start) // field.row
        first, last = field.first_row + int(rows[0]), field.first_row + int(rows[-1]) + 1
        scale = np.asarray(file.read(Part("s", first, last)), np.float32)[rows - rows[0]]
        out[positions - (field.start + start)] = np.where(minus, -scale, scale)

    return decode


def _row_scales(block: DeltaBlock, here: Positions) -> Floats:
    """The scale of each row of a block. The residual replaces the change of its elements `here`."""
    change, row = block.change, block.field.row
    sizes, of = np.abs(change[here]), here // row
    count = -(-len(change) // row)
    sums = np.bincount(of, sizes, minlength=count)
    scale = (sums / np.maximum(np.bincount(of, minlength=count), 1)).astype(np.float32)
    change[here] -= np.copysign(scale[of], change[here])
    return scale


class _SmallTensors:
    """The smallest tensors, together at most 1/50 of the model, and their positions in tensor q."""

    def __init__(self, layout: FlatLayout) -> None:
        self.fields: dict[str, FlatTensor] = {}
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


def _max_elements(share: float, count: int) -> int:
    """The number of elements to send, of `count`."""
    return math.ceil(count * share)


def _check_schema(file: WeightReader, most: Schema) -> None:
    """Raise BadWeights unless the file has these tensors, none of them longer."""
    found = file.schema
    kinds = [(name, spec.dtype, len(spec.shape)) for name, spec in sorted(found.items())]
    if kinds != [(name, spec.dtype, 1) for name, spec in most.items()] or any(
        found[name].nbytes > most[name].nbytes for name in most
    ):
        raise BadWeights(
            f"the tensors are not those of this codec, or longer than {most}: does the sender run "
            "another version of commonweight?"
        )


class _LargestChanges:
    """The largest changes that are not 0: ascending `positions` on the flat axis, and `values`.

    Leaves out `small` tensors.
    """

    def __init__(
        self, changes: DeltaReader, share: float, small: _SmallTensors | None = None
    ) -> None:
        skipped = small.fields if small else {}
        most = _max_elements(share, changes.layout.count - (small.count if small else 0))
        least = _threshold_class(changes, most, skipped)
        where: list[Positions] = [np.empty(0, np.int64)]
        values: list[Floats] = [np.empty(0, np.float32)]
        for block in _without(skipped, changes):
            here = np.flatnonzero(_magnitude_bits(block.change) >= max(least << _DROPPED, 1))
            where.append(here + (block.field.start + block.start))
            values.append(block.change[here])
        self.positions, self.values = np.concatenate(where), np.concatenate(values)
        if (excess := len(self.positions) - most) > 0:
            sizes = _magnitude_bits(self.values)
            last = np.flatnonzero(sizes >> _DROPPED == least)
            smallest = last[np.argpartition(sizes[last], excess - 1)[:excess]]
            self.positions = np.delete(self.positions, smallest)
            self.values = np.delete(self.values, smallest)

    def within(self, block: DeltaBlock) -> Positions:
        """The positions in a block of its chosen elements."""
        start = block.field.start
        first, last = np.searchsorted(self.positions, (start + block.start, start + block.stop))
        return self.positions[first:last] - (start + block.start)

    def gaps(self) -> npt.NDArray[np.uint8]:
        writer = GapWriter()
        starts = range(0, max(len(self.positions), 1), BLOCK_ELEMENTS)
        return np.concatenate(
            [writer.encode(self.positions[at : at + BLOCK_ELEMENTS]) for at in starts]
        )


def _magnitude_bits(change: Floats) -> npt.NDArray[np.uint32]:
    """The bits of the floats without their signs, which sort like the absolute values."""
    return change.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _without(skipped: Container[str], changes: DeltaReader) -> Iterator[DeltaBlock]:
    return (block for block in changes.blocks() if block.field.name not in skipped)


def _threshold_class(changes: DeltaReader, most: int, skipped: Container[str]) -> int:
    """The largest size class such that it and the classes above have at least `most` elements."""
    counts = np.zeros(1 << (31 - _DROPPED), np.int64)
    for block in _without(skipped, changes):
        classes = (_magnitude_bits(block.change) >> _DROPPED).astype(
            np.intp
        )  # bincount converts slowly
        counts += np.bincount(classes, minlength=len(counts))
    from_above = np.cumsum(counts[::-1])
    return max(len(counts) - 1 - int(np.searchsorted(from_above, most)), 0)
