"""Tables read by Dask: in this process, or on a cluster of this machine's owner by its address.

A cluster's workers need commonweight installed, and see the same files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, reduce
from typing import Any, TypeVar

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

from agent.data import Aggregation
from agent.data.arrow_reader import (
    ROWS,
    align_columns,
    find_files,
    is_parquet,
    map_errors,
    read_header,
    separator,
)

S = TypeVar("S")


@cache
def client(address: str) -> Any:
    """The one connection of this process to a scheduler."""
    from distributed import Client

    return Client(address)


class DaskReader:
    """Files by path, folder or pattern. `address` is a scheduler's, such as tcp://10.0.0.5:8786."""

    def __init__(self, path: str, address: str = "") -> None:
        self._files = find_files(path)
        self._scheduler: Any = client(address) if address else "threads"

    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for file in self._files for name in read_header(file)))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with map_errors(self._files[0]):
            for partition in self._partitions(columns):
                (frame,) = dask.compute(partition, scheduler=self._scheduler)
                yield from _batches(frame, columns)

    def aggregate(self, operation: Aggregation[S], columns: Sequence[str]) -> S | None:
        fold = dask.delayed(_folded)
        parts = [fold(part, operation, tuple(columns)) for part in self._partitions(columns)]
        with map_errors(self._files[0]):
            states = dask.compute(*parts, scheduler=self._scheduler)
        found = [state for state in states if state is not None]
        return reduce(operation.merge, found) if found else None

    def _partitions(self, columns: Sequence[str]) -> list[Any]:
        """Each file in pieces; files may have their columns in different orders."""
        found: list[Any] = []
        for file in self._files:
            here = [name for name in read_header(file) if name in set(columns)]
            if is_parquet(file):
                frame = dd.read_parquet(file, columns=here, dtype_backend="pyarrow")
            else:
                # All as text: what it means is decided in `values`, for all readers alike.
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


def _folded(frame: pd.DataFrame, operation: Aggregation[S], columns: Sequence[str]) -> S | None:
    states = (operation.from_batch(batch) for batch in _batches(frame, columns))
    first = next(states, None)
    return first if first is None else reduce(operation.merge, states, first)
