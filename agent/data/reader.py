"""What every reader of tables is, and the folds that run over its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

S = TypeVar("S")


class Aggregation(Protocol[S]):
    """A fold over batches whose states merge in any order. A cluster of this machine's owner may
    run it elsewhere; its states then travel as msgpack."""

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


class Reader(Protocol):
    """A table on this machine, or on its owner's cluster."""

    def columns(self) -> tuple[str, ...]:
        """Names, in the table's order. Raises DataError."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows, these columns only, some ten thousand rows at a time. Raises DataError."""
        ...

    def aggregate(self, operation: Aggregation[S], columns: Sequence[str]) -> S | None:
        """The operation's state over all rows; None for no rows. Raises DataError."""
        ...
