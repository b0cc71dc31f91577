"""Tables read by Dask, in this process or on the owner's cluster.

The workers of a cluster need commonweight and access to the same files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

from agent.data import Aggregation, merge_states
from agent.data.arrow_reader import (
    ROWS,
    FileTable,
    align_columns,
    is_parquet,
    map_errors,
    separator,
)

S = TypeVar("S")


@cache
def client(address: str) -> Any:
    """This process's connection to a scheduler."""
    from distributed import Client

    return Client(address)


class DaskReader(FileTable):
    """Reads files in parallel. `address` is that of a scheduler, such as tcp://10.0.0.5:8786."""

    def __init__(self, path: str, address: str = "") -> None:
        super().__init__(path)
        self._scheduler: Any = client(address) if address else "threads"

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with map_errors(self._files[0]):
            for partition in self._partitions(columns):
                (frame,) = dask.compute(partition, scheduler=self._scheduler)
                yield from _batches(frame, columns)

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        fold = dask.delayed(_aggregate)
        parts = [fold(part, aggregation, tuple(columns)) for part in self._partitions(columns)]
        with map_errors(self._files[0]):
            states = dask.compute(*parts, scheduler=self._scheduler)
        return merge_states(aggregation, (state for state in states if state is not None))

    def _partitions(self, columns: Sequence[str]) -> list[Any]:
        """Each file in pieces."""
        found: list[Any] = []
        for file in self._files:
            here = self._columns_in(file, columns)
            if is_parquet(file):
                frame = dd.read_parquet(file, columns=here, dtype_backend="pyarrow")
            else:
                # All as text: `column_types` interprets it, in the same way for all readers.
                frame = dd.read_csv(
                    file,
                    sep=separator(file),
                    usecols=here,
                    dtype=str,
                    keep_default_na=False,
                    encoding="utf-8-sig",
                )
            found += frame.to_delayed()
        return found


def _batches(frame: pd.DataFrame, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for batch in table.to_batches(max_chunksize=ROWS):
        yield align_columns(batch, columns)


def _aggregate(
    frame: pd.DataFrame, aggregation: Aggregation[S], columns: Sequence[str]
) -> S | None:
    return merge_states(aggregation, map(aggregation.from_batch, _batches(frame, columns)))
