"""The evaluation loop of every task: batch by batch, sums become means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from agent.tasks import EvalOutcome, OnStep
from protocols.tables import evaluation_counts
from protocols.tables.evaluation_counts import Tallies

Batch = TypeVar("Batch")
Item = TypeVar("Item", covariant=True)


class Batches(Protocol[Item]):
    """Batches with a known number of them."""

    def __iter__(self) -> Iterator[Item]: ...

    def __len__(self) -> int: ...


class BatchResult(NamedTuple):
    """The result of one batch: the number of its examples, sums over them, and counts.

    `sums` has "loss". If `tallies` is empty for one batch, the evaluation has no tallies.
    """

    examples: int
    sums: Mapping[str, float]
    tallies: Tallies = MappingProxyType({})


def evaluate(
    batches: Batches[Batch],
    measure: Callable[[Batch], BatchResult],
    on_step: OnStep,
) -> EvalOutcome:
    """The means of the sums, and the counts of all batches."""
    seen = 0
    sums: dict[str, float] = {}
    tallies: list[Tallies] = []
    for number, batch in enumerate(batches, 1):
        found = measure(batch)
        seen += found.examples
        for name, value in found.sums.items():
            sums[name] = sums.get(name, 0.0) + value
        tallies.append(found.tallies)
        on_step(number, len(batches), sums["loss"] / seen, seen)
    means = {name: value / seen for name, value in sums.items()}
    if not all(tallies):
        return EvalOutcome(seen, means)
    return EvalOutcome(seen, means, evaluation_counts.merge(tallies, [1.0] * len(tallies)))
