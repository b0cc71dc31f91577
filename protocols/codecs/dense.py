"""The dense encodings of a change of the weights: bf16, int8 and sign. Pure numpy.

An encoded change is a canonical safetensors file with one or two tensors over the flat axis of
`delta`, so its header is small for any number of model tensors:

    bf16   d BF16[n]
    int8   q I8[n]         s F32[rows]      change = q * scale of its row
    sign   b U8[bytes]     s F32[tensors]   change = scale of its tensor, negative if the bit is set

Encodings that send few elements are in `sparse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from protocols.codecs.delta import (
    BLOCK_ELEMENTS,
    MAX_CHANGE,
    DeltaBlock,
    DeltaReader,
    FlatLayout,
    FlatTensor,
    Floats,
)
from protocols.errors import BadWeights
from protocols.model.bfloat16 import bf16_to_float32, float32_to_bf16
from protocols.model.weights import (
    Array,
    Part,
    Schema,
    TensorSpec,
    WeightReader,
    check_schema,
)

#: `decode(field, start, stop, out)` writes these elements of a tensor's change to `out`.
Decode = Callable[[FlatTensor, int, int, Floats], None]

_SMALLEST = float(np.finfo(np.float32).tiny)


class Sink(Protocol):
    """Where an encoding writes the encoded file and the residual."""

    def begin(self, schema: Schema) -> None:
        """Set the schema of the encoded file; called first."""
        ...

    def put(self, name: str, array: Array) -> None:
        """Append to a tensor of the encoded file; tensors come in name order."""
        ...

    def put_residual(self, residual: Floats) -> None:
        """Append the residual of the next block: change - decoded change."""
        ...


class Encoding(Protocol):
    """How a codec encodes and decodes a change."""

    def schema(self, layout: FlatLayout) -> Schema:
        """The schema of the encoded file; for a sparse encoding, the largest one."""
        ...

    def encode(self, changes: DeltaReader, to: Sink) -> None: ...

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        """What decodes this file, which is checked. Raises BadWeights."""
        ...


class Bf16:
    """The change, rounded to bfloat16."""

    def schema(self, layout: FlatLayout) -> Schema:
        return {"d": TensorSpec("BF16", (layout.count,))}

    def encode(self, changes: DeltaReader, to: Sink) -> None:
        to.begin(self.schema(changes.layout))
        for block in changes.blocks():
            bits = float32_to_bf16(block.change)
            to.put("d", bits)
            to.put_residual(np.subtract(block.change, bf16_to_float32(bits), out=block.change))

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        check_schema(file.schema, self.schema(layout))

        def decode(field: FlatTensor, start: int, stop: int, out: Floats) -> None:
            bits = file.read(Part("d", field.start + start, field.start + stop))
            np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)

        return decode


class Int8:
    """Integers from -127 to 127 times a scale per row of the tensor."""

    def schema(self, layout: FlatLayout) -> Schema:
        return {"q": TensorSpec("I8", (layout.count,)), "s": TensorSpec("F32", (layout.rows,))}

    def encode(self, changes: DeltaReader, to: Sink) -> None:
        to.begin(self.schema(changes.layout))
        whole, scales = Quantizer(), [np.empty(0, np.float32)]
        for block in changes.blocks(lambda field: field.row):
            steps, scale = whole.quantize(block)
            scales.append(scale)
            to.put("q", steps)
            to.put_residual(block.change)
        to.put("s", np.concatenate(scales))

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        check_schema(file.schema, self.schema(layout))
        check_scales(file, layout.rows)
        return int8_decoder(file)


class Quantizer:
    """Quantizes blocks of whole rows to int8."""

    def __init__(self) -> None:
        self._steps, self._coded = (
            np.empty(BLOCK_ELEMENTS, np.float32),
            np.empty(BLOCK_ELEMENTS, np.int8),
        )

    def quantize(self, block: DeltaBlock) -> tuple[npt.NDArray[np.int8], Floats]:
        """The integers, in a buffer that is reused, and the scale of each row.

        The residual replaces the block's change.
        """
        change, row = block.change, block.field.row
        scales: list[Floats] = []
        for first, last in _by_row(0, len(change), row):
            shape = (-1, min(row, last - first))
            rows = change[first:last].reshape(shape)
            scale = np.maximum(rows.max(1), -rows.min(1)) / np.float32(127)
            # Below this, 1 / scale is infinite: the whole row goes to the residual.
            scale[scale < _SMALLEST] = 0
            scales.append(scale)
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
            step = self._steps[first:last].reshape(shape)
            np.rint(np.multiply(rows, inverse[:, None], out=step), out=step)
            np.copyto(self._coded[first:last].reshape(shape), step, casting="unsafe")
            rows -= np.multiply(step, scale[:, None], out=step)
        return self._coded[: len(change)], np.concatenate(scales)


def int8_decoder(file: WeightReader) -> Decode:
    """Decodes the integers in tensor q with the scales in tensor s."""

    def decode(field: FlatTensor, start: int, stop: int, out: Floats) -> None:
        coded = file.read(Part("q", field.start + start, field.start + stop))
        first = start // field.row
        last = -(-stop // field.row)
        scale = file.read(Part("s", field.first_row + first, field.first_row + last))
        for begin, end in _by_row(start, stop, field.row):
            row = begin // field.row - first
            width = min(field.row, end - begin)
            count = (end - begin) // width
            np.multiply(
                coded[begin - start : end - start].reshape(count, width),
                scale[row : row + count, None],
                out=out[begin - start : end - start].reshape(count, width),
            )

    return decode


def _by_row(start: int, stop: int, row: int) -> Iterator[tuple[int, int]]:
    """Split `start`…`stop` into the end of a row, whole rows, and the beginning of a row."""
    for limit in (-(-start // row) * row, stop // row * row, stop):
        limit = min(limit, stop)
        if start < limit:
            yield start, limit
            start = limit


class Sign:
    """One bit per element; the scale is the mean absolute change of the tensor."""

    def schema(self, layout: FlatLayout) -> Schema:
        return {
            "b": TensorSpec("U8", (layout.sign_bytes,)),
            "s": TensorSpec("F32", (len(layout.fields),)),
        }

    def encode(self, changes: DeltaReader, to: Sink) -> None:
        to.begin(self.schema(changes.layout))
        fields = changes.layout.fields
        size = np.zeros(len(fields), np.float64)
        scratch = np.empty(BLOCK_ELEMENTS, np.float32)
        for field, start, stop, change in changes.blocks(_octets):
            size[field.number] += np.abs(change, out=scratch[: stop - start]).sum(dtype=np.float64)
        counts = np.array([field.size for field in fields.values()], np.float64)
        scale = (size / counts).astype(np.float32)
        for field, start, stop, change in changes.blocks(_octets):
            to.put("b", np.packbits(np.signbit(change)))
            change -= np.copysign(scale[field.number], change, out=scratch[: stop - start])
            to.put_residual(change)
        to.put("s", scale)

    def open(self, file: WeightReader, layout: FlatLayout) -> Decode:
        check_schema(file.schema, self.schema(layout))
        check_scales(file, len(layout.fields))
        for field in layout.fields.values():
            if field.size % 8:
                last = field.first_byte + field.size // 8
                if int(file.read(Part("b", last, last + 1))[0]) & (0xFF >> field.size % 8):
                    raise BadWeights(f"bits are set beyond the end of tensor {field.name!r}")
        aligned = np.empty(BLOCK_ELEMENTS + 16, np.float32)

        def decode(field: FlatTensor, start: int, stop: int, out: Floats) -> None:
            first, last = start // 8, -(-stop // 8)
            bits = file.read(Part("b", field.first_byte + first, field.first_byte + last))
            scale = np.asarray(file.read(Part("s", field.number, field.number + 1)), np.float32)
            signs = aligned[: len(bits) * 8]
            rows, places = signs.reshape(-1, 8), bits.astype(np.intp)
            np.take(_SIGNS * scale, places, axis=0, out=rows, mode="clip")
            out[:] = signs[start - first * 8 : stop - first * 8]

        return decode


def _octets(field: FlatTensor) -> int:
    return 8


#: For each byte value and bit, highest first: +1 if the bit is not set, -1 if it is.
_SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32)


def check_scales(file: WeightReader, count: int) -> None:
    """Raise BadWeights unless all `count` scales in tensor s are at least 0 and not too large."""
    for start in range(0, count, BLOCK_ELEMENTS):
        scales = np.asarray(
            file.read(Part("s", start, min(start + BLOCK_ELEMENTS, count))), np.float32
        )
        if not (scales.max() <= MAX_CHANGE and scales.min() >= 0):
            raise BadWeights("a scale is negative, too large or NaN")
