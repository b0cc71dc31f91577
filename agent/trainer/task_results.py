"""Checks what a task returns: schemas, tensors, counts and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from agent.data.settings import DataSettings
from agent.tasks import Settings, Task
from agent.tasks.capabilities import CountsExamples, KnowsRows
from agent.tasks.work import Done
from protocols.messages.envelope import Metrics
from protocols.model import weights
from protocols.model.weights import Array, Schema, TensorSpec, Weights


def normalize_schema(schema: Schema) -> Schema:
    """The schema with TensorSpec values, where a task may have used plain tuples."""
    return {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in schema.items()}


def check_tensors(tensors: Mapping[str, Array], schema: Schema) -> Weights:
    """The tensors of a task as weights. Raises BadWeights."""
    if not isinstance(tensors, Weights):
        tensors = Weights(tensors, weights.bf16_names(schema))
    weights.check_schema(tensors.schema, schema)
    return tensors


def count_examples(task: Task, settings: Settings, data: DataSettings) -> tuple[int, int]:
    """The examples that `task` trains on and holds out, if this peer may tell them now; else 0.

    The number of rows left in a remembered table leaves only with the answers that depend on them,
    as those are compared with earlier ones.
    """
    remembers = bool(data.memory) and isinstance(task, KnowsRows)
    if remembers or not isinstance(task, CountsExamples):
        return 0, 0
    train, held_out = map(int, task.count_examples(settings))
    least = data.floors.min_count
    return train if train >= least else 0, held_out if held_out >= least else 0


def make_done(
    work: int, digest: str, nbytes: int, num_examples: int, metrics: Mapping[str, float]
) -> Done:
    """The result of work, with plain numbers, where a task may have returned NumPy's."""
    plain = {str(name): float(value) for name, value in metrics.items()}
    return Done(
        id=work,
        digest=digest,
        nbytes=nbytes,
        num_examples=int(num_examples),
        metrics=msgspec.convert(plain, Metrics),
    )
