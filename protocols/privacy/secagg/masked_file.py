"""Masked updates as files, and the mean of a cohort read from them piece by piece.

A file is canonical safetensors with two tensors:

    t  I64[m]             masked metrics
    w  I32[n] or I16[n]   masked update over the flat axis of `codecs.delta`

Memory grows with neither the model nor the number of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from protocols.codecs.delta import DeltaReader, FlatLayout, Floats, add
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

#: The largest root mean square of a tensor's change, as a part of its limit. If most elements were
#: clipped, a sum would tell the signs of each peer's, by their weights.
_MAX_TYPICAL = 0.5
_SIGNED = {16: "I16", 32: "I32"}


def layout(model: Schema) -> tuple[int, ...]:
    """The elements of each tensor that is averaged, in the order of a plan."""
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
    by root mean square; with shared noise it is refused. The same weights give the same bytes, so
    the file needs no fsync.
    Raises BadWeights, OSError.
    """
    plan, schema = masking.cohort.plan, file_schema(masking.cohort.plan)
    changes = _changes(*weights, plan, masking.factor) if weights else iter(())
    with WeightsWriter(path, schema, synced=False) as file:
        tail = masking.tail(metrics).view("<i8")
        file.write({Part("t", 0, len(tail)): tail})
        start = 0
        for block in masking.blocks(changes):
            stop = start + len(block)
            file.write({Part("w", start, stop): block.view(f"<i{plan.ring // 8}")})
            start = stop
    return file.digest, file.nbytes


def _changes(
    trained: WeightReader, base: WeightReader, plan: Plan, multiplier: float
) -> Iterator[tuple[int, Floats]]:
    """The blocks of the change by number of the tensor, scaled down to the norm `plan.clip`, and so
    that few elements of a tensor exceed its limit.

    With shared noise (a `multiplier`) nothing is scaled down: see docs/notes/shared-noise.md.
    """
    check_schema(trained.schema, base.schema)
    if layout(base.schema) != plan.sizes:
        raise BadWeights("the plan of the cohort is of another model")
    changes = DeltaReader(trained, base, None, "")
    if multiplier:
        _check_unclipped(changes, plan, multiplier)
        for one in changes.blocks():
            yield one.field.number, one.change
        return
    squares = [0.0] * len(plan.sizes)
    for one in changes.blocks():
        squares[one.field.number] += float(np.square(one.change, dtype=np.float64).sum())
    norm = math.sqrt(sum(squares))
    whole = min(1.0, plan.clip / norm) if norm else 1.0
    factors = []
    for square, size, limit in zip(squares, plan.sizes, plan.limits, strict=True):
        typical = math.sqrt(square / size)
        factors.append(np.float32(min(whole, _MAX_TYPICAL * limit / typical) if typical else whole))
    for one in changes.blocks():
        factor = factors[one.field.number]
        yield one.field.number, one.change if factor == 1 else one.change * factor


def _check_unclipped(changes: DeltaReader, plan: Plan, factor: float) -> None:
    """Raise BadWeights if a change times `factor` exceeds what honest training can give."""
    squares = 0.0
    for one in changes.blocks():
        if factor * float(np.abs(one.change).max(initial=0.0)) > plan.limits[one.field.number]:
            raise BadWeights("an element of the update is larger than its rows and noise can be")
        squares += float(np.square(one.change, dtype=np.float64).sum())
    if factor * math.sqrt(squares) > plan.clip:
        raise BadWeights("the norm of the update is larger than that of its rows and noise can be")


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
