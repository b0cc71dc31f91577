"""Updates that are integers for a sum, as a version of trees asks for them. Pure.

An update is a file with one tensor, "sums" I32[n]. The version determines n
(`protocols.tables.trees.layout`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from protocols.model.weights import Array, Part, Schema, TensorSpec, WeightReader
from protocols.tables.trees import layout
from protocols.tables.trees.layout import SUMS, Numbers, Position, Shape


def read_version(version: WeightReader) -> tuple[dict[str, Array], Position, Numbers]:
    """The arrays of a version, where it stands, and its numbers. Raises BadWeights."""
    shape = Shape.of(version.schema)
    arrays = {
        name: version.read(Part(name, 0, math.prod(spec.shape))).reshape(spec.shape)
        for name, spec in version.schema.items()
    }
    return arrays, *layout.read(arrays, shape)


def schema_of(version: WeightReader) -> Schema:
    """The schema of the updates that a version asks for. Raises BadWeights."""
    _, at, _ = read_version(version)
    return {SUMS: TensorSpec("I32", (math.prod(at.sums),))}


def read(update: WeightReader) -> npt.NDArray[np.int64]:
    """The sums of an update: int64[n]."""
    count = math.prod(update.schema[SUMS].shape)
    return update.read(Part(SUMS, 0, count)).astype(np.int64)


def objection(update: WeightReader, version: WeightReader, rows: int, *, masked: bool) -> str:
    """The fault in the sums of `rows` rows, as text; empty if there is none. Raises BadWeights."""
    _, at, numbers = read_version(version)
    return layout.check_sums(read(update), at, numbers, rows, masked=masked)
