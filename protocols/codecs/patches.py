"""Patches: lossless differences from one version to the next, if they are small.

A patch is a canonical safetensors file over all elements of a model, in name order: `i` U8, the
positions of changed elements as gaps, and `v` U8, their new bytes. Patches are small for sparse
updates (topk) and for models that are mostly frozen (adapters). A sample of a few elements per
tensor decides whether to make one.
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

#: Smaller models get no patch.
MIN_BYTES = 256 * 1024
#: A patch must be smaller than this share of its version.
_MAX_SHARE = 0.5
#: Samples per tensor, and elements per sample.
_SAMPLES, _SAMPLE = 4, 256
_COPY_BYTES = 1024 * 1024
_SHAPES = {"i": "U8", "v": "U8"}


def make(parent: WeightsFile, child: WeightsFile, out: Path) -> int:
    """Write the patch from `parent` to `child`; return its size, or 0 if it would be large."""
    check_schema(child.schema, parent.schema)
    max_bytes = int(child.nbytes * _MAX_SHARE)
    if child.nbytes < MIN_BYTES or _estimate_bytes(parent, child) > max_bytes:
        return 0
    gaps = GapWriter()
    offset = 0
    with (
        tempfile.TemporaryFile(dir=out.parent) as positions,
        tempfile.TemporaryFile(dir=out.parent) as values,
    ):
        for part in _parts(child.schema):
            old, new = _bits(parent.read(part)), _bits(child.read(part))
            changed = np.flatnonzero(old != new)
            positions.write(gaps.encode(changed + offset).data)
            values.write(new[changed].view(np.uint8).data)
            offset += len(new)
            if positions.tell() + values.tell() > max_bytes:
                return 0
        files = {"i": positions, "v": values}
        schema = {name: TensorSpec("U8", (file.tell(),)) for name, file in files.items()}
        with WeightsWriter(out, schema) as writer:
            for name, file in files.items():
                _copy(file, name, writer)
    return writer.nbytes


def apply(parent: WeightsFile, patch: WeightReader, out: Path) -> str:
    """Write the version from `parent` and `patch`; return its digest, which the caller must check.

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
                raise BadWeights("the patch has fewer values than positions")
            bits = _bits(array)
            bits[changed - offset] = patch.read(Part("v", taken, end)).view(bits.dtype)
            writer.write({part: array})
            offset, taken = offset + size, end
        if taken != patch.schema["v"].nbytes:
            raise BadWeights("the patch has more values than positions")
    return writer.digest


def _parts(schema: Schema) -> Iterator[Part]:
    for piece in split_into_pieces(schema):
        yield from piece


def _bits(array: Array) -> Array:
    """The elements as unsigned integers, so that NaN equals itself and 0.0 differs from -0.0."""
    return array.view(f"u{array.itemsize}")


def _estimate_bytes(parent: WeightReader, child: WeightReader) -> float:
    """An estimate of the size of a patch, from samples of each tensor."""
    total = 0.0
    for name, spec in child.schema.items():
        count = math.prod(spec.shape)
        step = max(count // _SAMPLES, 1)
        sampled = changed = 0
        for start in range(0, count, step):
            part = Part(name, start, min(start + min(step, _SAMPLE), count))
            sampled += part.stop - part.start
            changed += int(np.count_nonzero(_bits(parent.read(part)) != _bits(child.read(part))))
        if changed:
            total += changed / sampled * (spec.nbytes + count)
    return total


def _copy(file: IO[bytes], name: str, writer: WeightsWriter) -> None:
    file.seek(0)
    start = 0
    while data := file.read(_COPY_BYTES):
        writer.write({Part(name, start, start + len(data)): np.frombuffer(data, np.uint8)})
        start += len(data)
