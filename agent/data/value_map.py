"""Values that the owner writes as other peers do: `YES` as `yes`. The table itself is not changed.

It comes after the memory of rows, which knows the table as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from agent.data import column_types
from agent.data.reader import Aggregation, Reader, merge_states
from agent.data.settings import MappedValues

S = TypeVar("S")


def with_values(reader: Reader, values: MappedValues) -> Reader:
    """The reader, with these values in place of others."""
    return _MappedReader(reader, values) if values else reader


class _MappedReader:
    def __init__(self, reader: Reader, values: MappedValues) -> None:
        self._reader, self._values = reader, values

    def columns(self) -> tuple[str, ...]:
        return self._reader.columns()

    def fingerprint(self) -> str:
        return self._reader.fingerprint()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in self._reader.batches(columns):
            arrays = [
                replace_values(array, self._values[name]) if name in self._values else array
                for name, array in zip(batch.schema.names, batch.columns, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        if self._values.keys().isdisjoint(columns):
            return self._reader.aggregate(aggregation, columns)
        return merge_states(aggregation, map(aggregation.from_batch, self.batches(columns)))


def replace_values(column: pa.Array, values: Mapping[str, str]) -> pa.Array:
    """The column as text, with some values replaced. Spaces around a value do not count."""
    texts = column_types.texts(column)
    places = pc.index_in(texts, value_set=pa.array(list(values), pa.string()))
    new = pa.array(list(values.values()), pa.string()).take(places)
    return pc.if_else(pc.is_valid(places), new, texts)
