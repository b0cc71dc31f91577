"""A peer's own tables: one interface over what reads them, within this machine's trust.

A reader gives batches of columns as Arrow record batches, bounded in size, so that a table larger
than memory can be read; and it folds an operation over all of them where they lie (`partial`).
Texts of CSV files are given as they are: what they mean is decided in `values`, for all readers
alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from agent.tasks import DataSettings
from protocols.errors import CommonweightError, DataFault, UnknownName

if TYPE_CHECKING:
    import pyarrow as pa

S = TypeVar("S")


class Operation(Protocol[S]):
    """A fold over batches whose states merge in any order. A cluster of this machine's owner may
    run it elsewhere; its states then travel as msgpack."""

    @property
    def state(self) -> Any:
        """The type of a state, as msgspec decodes it."""
        ...

    def of(self, batch: pa.RecordBatch) -> S:
        """The state of one batch."""
        ...

    def merged(self, a: S, b: S) -> S:
        """The state of both together."""
        ...


class Reader(Protocol):
    """A table on this machine, or on its owner's cluster."""

    def columns(self) -> tuple[str, ...]:
        """Names, in the table's order. Raises DataFault."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows, these columns only, some ten thousand rows at a time. Raises DataFault."""
        ...

    def partial(self, operation: Operation[S], columns: Sequence[str]) -> S | None:
        """The operation's state over all rows; None for no rows. Raises DataFault."""
        ...


def open_table(data: DataSettings) -> Reader:
    """The reader that the owner chose, over `data.path`. Raises DataFault, CommonweightError."""
    if not data.path:
        raise DataFault("this peer has no data", "commonweight-agent policy set data FILE")
    engine, _, address = data.reader.partition(":")
    try:
        if engine == "arrow":
            from agent.data.arrow import ArrowReader

            return ArrowReader(data.path)
        if engine == "dask":
            from agent.data.dask import DaskReader

            return DaskReader(data.path, address)
        if engine == "spark":
            from agent.data.spark import SparkReader

            return SparkReader(data.path, address)
    except ImportError as err:
        extra = {"arrow": "tabular"}.get(engine, engine)
        raise CommonweightError(
            f"tables are read by {err.name}, which is not installed",
            f"pip install 'commonweight[{extra}]'",
        ) from err
    raise UnknownName(f"there is no reader {data.reader!r}", "arrow, dask or spark")
