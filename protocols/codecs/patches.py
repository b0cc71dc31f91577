"""Patches: what changed from one version to the next, lossless, where that is little. Pure numpy.

A canonical safetensors file over all elements of a model, in name order: `i` U8, the positions of
changed elements as gaps, and `v` U8, their new bytes one after the other. Sparse updates (topk) and
models of which most stands still (adapters) make small ones; a look at a few elements of each
tensor says whether a patch is worth the trouble.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from protocols.codecs.index_coding import GapReader, GapWriter
from protocols.errors import BadWeights
from protocols.model.weights import (
    Array,
    Part,
    Schema,
    TensorSpec,
    WeightReader,
    check_schema,
    split_into_pieces,
)
from protocols.model.weights_file import WeightsFile, WeightsWriter

#: Smaller models are sent whole.
MIN_BYTES = 256 * 1024
#: A patch is less than this share of its version, or there is none.
_MOST_SHARE = 0.5
_LOOKS, _LOOK = 4, 256
_COPY_BYTES = 1024 * 1024
_SHAPES = {"i": "U8", "v": "U8"}


def make(parent: WeightsFile, child: WeightsFile, out: Path) -> int:
    """Write the patch from `parent` to `child`; its bytes, or 0 where there is no small one."""
    check_schema(child.schema, parent.schema)
    most = int(child.nbytes * _MOST_SHARE)
    if child.nbytes < MIN_BYTES or _estimate_bytes(parent, child) > most:
        return 0
    gaps = GapWriter()
    offset = 0
    with (
        tempfile.TemporaryFile(dir=out.parent) as where,
        tempfile.TemporaryFile(dir=out.parent) as what,
    ):
        for part in _parts(child.schema):
            old, new = _bits(parent.read(part)), _bits(child.read(part))
            changed = np.flatnonzero(old != new)
            where.write(gaps.encode(changed + offset).data)
            what.write(new[changed].view(np.uint8).data)
            offset += len(new)
            if where.tell() + what.tell() > most:
                return 0
        sizes = {"i": where.tell(), "v": what.tell()}
        schema = {name: TensorSpec("U8", (size,)) for name, size in sizes.items()}
        with WeightsWriter(out, schema) as writer:
            for name, file in (("i", where), ("v", what)):
                _copy(file, name, writer)
    return writer.nbytes


def apply(parent: WeightsFile, patch: WeightReader, out: Path) -> str:
    """Write the version that `patch` makes of `parent`; its digest, for the caller to compare.

    Raises BadWeights.
    """
    if {name: spec.dtype for name, spec in patch.schema.items()} != _SHAPES:
        raise BadWeights("not a patch")
    count = sum(math.prod(spec.shape) for spec in parent.schema.values())
    gaps = GapReader(patch, "i", count)
    offset = taken = 0
    with WeightsWriter(out, parent.schema) as writer:
        for part in _parts(parent.schema):
            array = parent.read(part)
            size = len(array)
            _, changed = gaps.between(offset, offset + size)
            end = taken + len(changed) * array.itemsize
            if end > patch.schema["v"].nbytes:
                raise BadWeights("a patch with fewer values than positions")
            bits = _bits(array)
            bits[changed - offset] = patch.read(Part("v", taken, end)).view(bits.dtype)
            writer.write({part: array})
            offset, taken = offset + size, end
        if taken != patch.schema["v"].nbytes:
            raise BadWeights("a patch with more values than positions")
    return writer.digest


def _parts(schema: Schema) -> Iterator[Part]:
    for piece in split_into_pieces(schema):
        yield from piece


def _bits(array: Array) -> Array:
    """The elements as unsigned integers: NaN is equal to itself, and 0.0 is not -0.0."""
    return array.view(f"u{array.itemsize}")


def _estimate_bytes(parent: WeightReader, child: WeightReader) -> float:
    """About what a patch would take, from a few elements here and there in each tensor."""
    total = 0.0
    for name, spec in child.schema.items():
        count = math.prod(spec.shape)
        step = max(count // _LOOKS, 1)
        seen = changed = 0
        for start in range(0, count, step):
            part = Part(name, start, min(start + min(step, _LOOK), count))
            seen += part.stop - part.start
            changed += int(np.count_nonzero(_bits(parent.read(part)) != _bits(child.read(part))))
        if changed:
            total += changed / seen * (spec.nbytes + count)
    return total


def _copy(file: IO[bytes], name: str, writer: WeightsWriter) -> None:
    file.seek(0)
    start = 0
    while data := file.read(_COPY_BYTES):
        writer.write({Part(name, start, start + len(data)): np.frombuffer(data, np.uint8)})
        start += len(data)
