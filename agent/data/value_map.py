"""Values that the owner writes as other peers do: `YES` as `yes`, or 1,5 as 1.5. The table itself
is not changed.

It is applied after the record of rows, which uses the table as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from agent.data import column_types, value_formats
from agent.data.reader import Aggregation, Reader, merge_states
from agent.data.settings import Format, MappedValues

S = TypeVar("S")
_TRUTH = ("true", "false")


def with_values(
    reader: Reader, values: MappedValues, formats: Mapping[str, Format] = MappingProxyType({})
) -> Reader:
    """The reader, with these values in place of others, and then with numbers and dates of these
    formats."""
    return _MappedReader(reader, values, formats) if values or formats else reader


class _MappedReader:
    def __init__(self, reader: Reader, values: MappedValues, formats: Mapping[str, Format]) -> None:
        self._reader, self._values, self._formats = reader, values, formats

    def columns(self) -> tuple[str, ...]:
        return self._reader.columns()

    def fingerprint(self) -> str:
        return self._reader.fingerprint()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in self._reader.batches(columns):
            arrays = [
                self._read(name, array)
                for name, array in zip(batch.schema.names, batch.columns, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        if {*self._values, *self._formats}.isdisjoint(columns):
            return self._reader.aggregate(aggregation, columns)
        return merge_states(aggregation, map(aggregation.from_batch, self.batches(columns)))

    def _read(self, name: str, column: pa.Array) -> pa.Array:
        if name in self._values:
            column = replace_values(column, self._values[name])
        if name in self._formats:
            column = value_formats.to_plain(column, self._formats[name])
        return column


def replace_values(column: pa.Array, values: Mapping[str, str]) -> pa.Array:
    """The column as text, with some values replaced. Spaces around a value do not count, nor does
    the case of `true` and `false`."""
    texts = column_types.texts(column)
    words = texts
    if not values.keys().isdisjoint(_TRUTH):
        lower = pc.utf8_lower(texts)
        if pa.types.is_boolean(column.type):
            lower = pc.if_else(column, "true", "false")
        words = pc.if_else(pc.is_in(lower, value_set=pa.array(_TRUTH)), lower, texts)
    places = pc.index_in(words, value_set=pa.array(list(values), pa.string()))
    new = pa.array(list(values.values()), pa.string()).take(places)
    return pc.if_else(pc.is_valid(places), new, texts)
