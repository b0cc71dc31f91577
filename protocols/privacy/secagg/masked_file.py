"""Masked updates as files, and the mean of a cohort read from them piece by piece.

A file is canonical safetensors with two tensors:

    t  I64[m]             masked metrics
    w  I32[n] or I16[n]   masked update over the flat axis of `codecs.delta`

Memory grows with neither the model nor the number of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from protocols.codecs.delta import BLOCK_ELEMENTS, DeltaReader, FlatLayout, Floats, add
from protocols.errors import BadWeights
from protocols.model.weights import (
    Array,
    Part,
    Schema,
    TensorSpec,
    WeightReader,
    check_schema,
)
from protocols.model.weights_file import WeightsWriter
from protocols.privacy.secagg import ring, tails
from protocols.privacy.secagg.cohort import Cohort
from protocols.privacy.secagg.messages import Plan
from protocols.privacy.secagg.recovery import Recovery
from protocols.privacy.secagg.turn import Masking
from protocols.tables.trees.layout import SUMS

#: The largest root mean square of a tensor's change, as a part of its limit. If most elements were
#: clipped, a sum would tell the signs of each peer's, by their weights.
_MAX_TYPICAL = 0.5
#: Sums of squares below this part of their maximum need no scaling, in spite of rounding errors.
_NEAR = 0.999
_SIGNED = {16: "I16", 32: "I32"}


def layout(model: Schema) -> tuple[int, ...]:
    """The elements of each tensor that is averaged, or of the sums, in the order of a plan."""
    if model.keys() == {SUMS}:
        return (math.prod(model[SUMS].shape),)
    return tuple(field.size for field in FlatLayout(model).fields.values())


def file_schema(plan: Plan) -> Schema:
    """The schema of a masked update."""
    count = sum(plan.sizes)
    return {
        "t": TensorSpec("I64", (tails.count(plan.names),)),
        "w": TensorSpec(_SIGNED[plan.ring], (count,)),
    }


def write(
    masking: Masking,
    weights: tuple[WeightReader, WeightReader] | None,
    metrics: list[float],
    path: Path,
) -> tuple[str, int]:
    """Write the masked change of a training; returns digest and bytes of the file.

    `weights`: the trained ones and their base; None for an evaluation. `metrics`: from `tails`. A
    change with a norm above `plan.clip` is scaled down to it, and a tensor's to half of its limit
    by root mean square; with shared noise it is refused. Of an exact plan, the sums are written
    instead. The same weights give the same bytes, so the file needs no fsync.
    Raises BadWeights, OSError.
    """
    plan = masking.cohort.plan
    if weights is None:
        return _write(masking, (), metrics, path)
    trained, base = weights
    if plan.exact:
        return _write(masking, _sums(trained, plan), metrics, path)
    check_schema(trained.schema, base.schema)
    if layout(base.schema) != plan.sizes:
        raise BadWeights("the plan of the cohort is of another model")
    changes = DeltaReader(trained, base, None, "")
    if masking.factor:
        return _write(masking, _unclipped(changes, plan, masking.factor), metrics, path)
    try:  # in one pass, as a change is rarely too large
        return _write(masking, _unscaled(changes, plan), metrics, path)
    except _TooLarge:
        return _write(masking, _scaled(changes, plan), metrics, path)


def _write(
    masking: Masking, changes: Iterable[tuple[int, Array]], metrics: list[float], path: Path
) -> tuple[str, int]:
    """Write the masked change from its blocks, by number of the tensor. Nothing without all."""
    plan, start = masking.cohort.plan, 0
    with WeightsWriter(path, file_schema(plan), synced=False) as file:
        tail = masking.tail(metrics).view("<i8")
        file.write({Part("t", 0, len(tail)): tail})
        for block in masking.blocks(changes):
            stop = start + len(block)
            file.write({Part("w", start, stop): block.view(f"<i{plan.ring // 8}")})
            start = stop
    return file.digest, file.nbytes


def _sums(update: WeightReader, plan: Plan) -> Iterator[tuple[int, Array]]:
    """The sums in blocks. Raises BadWeights for an update without sums of the plan's size."""
    check_schema(update.schema, {SUMS: TensorSpec("I32", plan.sizes)})
    count = plan.sizes[0]
    for start in range(0, count, BLOCK_ELEMENTS):
        yield 0, update.read(Part(SUMS, start, min(count, start + BLOCK_ELEMENTS)))


class _TooLarge(Exception):
    """The change may have to be scaled down."""


def _unscaled(changes: DeltaReader, plan: Plan) -> Iterator[tuple[int, Floats]]:
    """The blocks of the change as they are. Raises _TooLarge unless `_scaled` gives the same."""
    sizes_limits = zip(plan.sizes, plan.limits, strict=True)
    most = [_NEAR * size * (_MAX_TYPICAL * limit) ** 2 for size, limit in sizes_limits]
    sums, total = [0.0] * len(most), 0.0
    for one in changes.blocks():
        number, square = one.field.number, _square(one.change)
        sums[number] += square
        total += square
        if sums[number] > most[number] or total > _NEAR * plan.clip**2:
            raise _TooLarge
        yield number, one.change


def _scaled(changes: DeltaReader, plan: Plan) -> Iterator[tuple[int, Floats]]:
    """The blocks of the change, scaled down to the norm `plan.clip`, and so that few elements of a
    tensor exceed its limit."""
    squares = [0.0] * len(plan.sizes)
    for one in changes.blocks():
        squares[one.field.number] += _square(one.change)
    norm = math.sqrt(sum(squares))
    whole = min(1.0, plan.clip / norm) if norm else 1.0
    factors = []
    for square, size, limit in zip(squares, plan.sizes, plan.limits, strict=True):
        typical = math.sqrt(square / size)
        factors.append(np.float32(min(whole, _MAX_TYPICAL * limit / typical) if typical else whole))
    for one in changes.blocks():
        factor = factors[one.field.number]
        yield one.field.number, one.change if factor == 1 else one.change * factor


def _unclipped(changes: DeltaReader, plan: Plan, factor: float) -> Iterator[tuple[int, Floats]]:
    """The blocks of a change with shared noise, which is never scaled down: see
    docs/notes/shared-noise.md.

    Raises BadWeights if the change times `factor` exceeds what honest training can give.
    """
    squares = 0.0
    for one in changes.blocks():
        if factor * float(np.abs(one.change).max(initial=0.0)) > plan.limits[one.field.number]:
            raise BadWeights("an element of the update is larger than its rows and noise can be")
        squares += _square(one.change)
        yield one.field.number, one.change
    if factor * math.sqrt(squares) > plan.clip:
        raise BadWeights("the norm of the update is larger than that of its rows and noise can be")


def _square(change: Floats) -> float:
    return float(np.square(change, dtype=np.float64).sum())


def check_file(file: WeightReader, plan: Plan) -> None:
    """Raise BadWeights unless the file has the schema of a masked update of this plan."""
    check_schema(file.schema, file_schema(plan))


class SecureMean:
    """The weights after the mean of a cohort's updates, read part by part.

    `files`: of each survivor. Raises BadWeights if the sum is none that honest peers can have sent.
    """

    def __init__(
        self,
        cohort: Cohort,
        recovery: Recovery,
        files: Mapping[str, WeightReader],
        base: WeightReader,
    ) -> None:
        self.schema = base.schema
        self._cohort, self._recovery, self._base = cohort, recovery, base
        self._files = list(files.values())
        self._total_weight = sum(cohort.weights[peer] for peer in files)
        self._fields = FlatLayout(base.schema).fields

    def metrics(self) -> list[float]:
        """The sums of the metrics over the survivors."""
        count = tails.count(self._cohort.plan.names)
        total = np.zeros(count, np.uint64)
        for file in self._files:
            total += file.read(Part("t", 0, count)).view("<u8")
        self._recovery.unmask_tail(total)
        return ring.decode_tail(total)

    def sums(self) -> Array:
        """The sums of an exact plan: int32[n]."""
        total = np.zeros(sum(self._cohort.plan.sizes), ring.DTYPES[32])
        for file in self._files:
            total += file.read(Part("w", 0, len(total))).view(total.dtype)
        self._recovery.unmask(total)
        return total.view("<i4")

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        old = self._base.read(part)
        if (field := self._fields.get(part.name)) is None:
            return old
        plan, bits = self._cohort.plan, self._cohort.bits
        start, stop = field.start + part.start, field.start + part.stop
        dtype = ring.DTYPES[plan.ring]
        total = np.zeros(stop - start, dtype)
        for file in self._files:
            total += file.read(Part("w", start, stop)).view(dtype)
        self._recovery.unmask(total, start)
        signed = ring.check_sum(total, bits, self._total_weight)
        limit = plan.limits[field.number]
        return add(old, ring.dequantize(signed, limit, bits, self._total_weight), field.dtype)
