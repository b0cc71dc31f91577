"""The interface of table readers, and the aggregations that they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

S = TypeVar("S")


class Aggregation(Protocol[S]):
    """A fold over batches whose states merge in any order.

    On the owner's cluster it may run on other machines; its states then travel as msgpack.
    """

    @property
    def state_type(self) -> Any:
        """The type of a state, as msgspec decodes it."""
        ...

    def from_batch(self, batch: pa.RecordBatch) -> S:
        """The state of one batch."""
        ...

    def merge(self, a: S, b: S) -> S:
        """The state of both together."""
        ...


def merge_states(aggregation: Aggregation[S], states: Iterable[S]) -> S | None:
    """All states merged; None without any."""
    states = iter(states)
    first = next(states, None)
    return first if first is None else reduce(aggregation.merge, states, first)


class Reader(Protocol):
    """A table on this machine, or on its owner's cluster."""

    def columns(self) -> tuple[str, ...]:
        """Names, in the table's order. Raises DataError."""
        ...

    def fingerprint(self) -> str:
        """A hash of the content of the table's files. Raises DataError."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows of these columns, some ten thousand at a time. Raises DataError."""
        ...

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        """The state over all rows; None for no rows. Raises DataError."""
        return merge_states(aggregation, map(aggregation.from_batch, self.batches(columns)))
