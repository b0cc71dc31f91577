"""Profiles a table in two passes: the kinds of its columns, then their statistics.

Both passes are aggregations that any reader computes (`agent.data.Aggregation`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec.structs import replace

from agent.data import Reader, column_types
from agent.data.column_types import PossibleKinds
from agent.data.rare_values import most_frequent
from agent.data.settings import DataSettings
from protocols.errors import DataError, SchemaMismatch
from protocols.tables import mismatches, statistics
from protocols.tables.preprocessing import MAX_CLASSES, Preprocessing, TableSettings
from protocols.tables.statistics import (
    NUMERIC,
    ColumnKind,
    ColumnStatistics,
    Moments,
    TableStatistics,
)

_NAME_OF_ID = re.compile(
    r"(?i)(^|[_ .-])(id|ids|nr|no|num|number|key|uuid|guid|mrn|ssn)$|^\w*[a-z]Id$"
)


class KindAggregation:
    """The possible kinds of each column, by name."""

    @property
    def state_type(self) -> Any:
        return dict[str, PossibleKinds]

    def from_batch(self, batch: pa.RecordBatch) -> dict[str, PossibleKinds]:
        return {
            name: column_types.possible_kinds(batch.column(name)) for name in batch.schema.names
        }

    def merge(
        self, a: dict[str, PossibleKinds], b: dict[str, PossibleKinds]
    ) -> dict[str, PossibleKinds]:
        return {name: kinds.merge(b[name]) for name, kinds in a.items()}


class StatisticsAggregation(NamedTuple):
    """Statistics of columns of known kinds.

    Columns of numbers in `counted` get counts by value too, up to `MAX_CLASSES` different integers.
    """

    kinds: dict[str, ColumnKind]
    counted: frozenset[str] = frozenset()

    @property
    def state_type(self) -> Any:
        return TableStatistics

    def from_batch(self, batch: pa.RecordBatch) -> TableStatistics:
        columns = {name: self._column(name, batch.column(name)) for name in self.kinds}
        return TableStatistics(rows=len(batch), columns=columns)

    def merge(self, a: TableStatistics, b: TableStatistics) -> TableStatistics:
        whole = statistics.merge((a, b))
        columns = {name: self._bounded(column) for name, column in whole.columns.items()}
        return replace(whole, columns=columns)

    def _column(self, name: str, column: pa.Array) -> ColumnStatistics:
        kind = self.kinds[name]
        if kind == "empty":
            return ColumnStatistics(kind=kind, missing=len(column))
        if kind == "text":
            return _counts(column_types.texts(column))
        found = column_types.numbers(column, kind)
        there = found[~np.isnan(found)]
        whole = bool((there == np.floor(there)).all())
        column_statistics = ColumnStatistics(
            kind=kind,
            missing=len(found) - len(there),
            whole=whole,
            moments=statistics.compute_moments(there),
            extremes=((float(there.min()), float(there.max())) if len(there) else None),
        )
        if name not in self.counted or not whole:
            return column_statistics
        counts = _counts(column_types.whole_texts(there))
        return self._bounded(
            replace(column_statistics, categories=counts.categories, many=counts.many)
        )

    def _bounded(self, column: ColumnStatistics) -> ColumnStatistics:
        """Without the values of a number that takes many values, or fractional ones."""
        many = column.many or len(column.categories) > MAX_CLASSES
        if column.kind not in NUMERIC or (column.whole and not many):
            return column
        return replace(column, categories={}, others=0, many=many)


def _counts(column: pa.StringArray) -> ColumnStatistics:
    found = {pair["values"].as_py(): pair["counts"].as_py() for pair in pc.value_counts(column)}
    missing = found.pop(None, 0)
    if len(found) > statistics.MAX_CATEGORIES:
        total = sum(found.values())
        return ColumnStatistics(kind="text", missing=missing, others=total, many=True)
    return ColumnStatistics(kind="text", missing=missing, categories=found)


def survey(reader: Reader, data: DataSettings, wanted: TableSettings) -> TableStatistics:
    """Statistics of a table that may leave this machine: columns that the owner allows, no rare
    values.

    Raises DataError for too few rows, and for a column that is missing or not allowed.
    """
    names = _allowed(reader.columns(), data.columns, wanted)
    kinds = reader.aggregate(KindAggregation(), names)
    if kinds is None:
        raise DataError("this peer's table has no rows")
    found: dict[str, ColumnKind] = {
        name: "text" if name in wanted.categorical and kinds[name].some else kinds[name].kind
        for name in names
    }
    extremes = wanted.scaling == "minmax"
    if extremes and not data.extremes:
        raise DataError(
            "the owner does not tell the least and the most of a column, which minmax needs",
            "commonweight-agent policy set data.extremes true",
        )
    measure = StatisticsAggregation(found, frozenset({wanted.target}))
    table = reader.aggregate(measure, names)
    assert table is not None
    if table.rows < data.min_rows:
        raise DataError(
            f"the owner asks for at least {data.min_rows} rows, and there are fewer",
            f"there are {table.rows}: commonweight-agent policy set data.min_rows",
        )
    table = _without_sparse_numbers(reader, table, data.min_count)
    ids = _identifiers(reader, table, {wanted.target, *wanted.features})
    hashed = [n for n, kind in found.items() if kind == "text" and n != wanted.target]
    columns = {
        name: replace(
            column,
            extremes=column.extremes if extremes else None,
            unique=name in ids,
            written="" if name in wanted.categorical else kinds[name].written,
        )
        for name, column in table.columns.items()
    }
    table = replace(table, columns=columns)
    return statistics.without_rare_values(
        table, data.min_count, hashed=hashed if wanted.hashed else ()
    )


def _without_sparse_numbers(
    reader: Reader, table: TableStatistics, min_rows: int
) -> TableStatistics:
    """The statistics with constants for columns in which fewer than `min_rows` rows differ from the
    most frequent value: their sum would be that of a few rows."""
    kinds = {
        name: column.kind
        for name, column in table.columns.items()
        if column.extremes and _may_be_sparse(column.moments, *column.extremes, min_rows)
    }
    frequent: dict[str, float] = {}
    differing = dict.fromkeys(kinds, 0)
    for batch in reader.batches(list(kinds)) if kinds else ():
        for name, kind in kinds.items():
            values = column_types.numbers(batch.column(name), kind)
            values = values[~np.isnan(values)]
            if len(values) and name not in frequent:
                frequent[name] = float(most_frequent(values, min_rows))
            differing[name] += int(np.count_nonzero(values != frequent.get(name)))
    columns = dict(table.columns)
    for name, value in frequent.items():
        if differing[name] < min_rows:
            count = columns[name].moments.count
            columns[name] = replace(
                columns[name],
                whole=value.is_integer(),
                moments=Moments(count, value, 0.0),
                extremes=(value, value),
            )
    return replace(table, columns=columns)


def is_named_id(name: str) -> bool:
    """True if the name of a column is that of an identifier."""
    return bool(_NAME_OF_ID.search(name))


def _identifiers(reader: Reader, table: TableStatistics, chosen: set[str]) -> set[str]:
    """The columns of whole numbers with the name of an identifier, and another number in each row.
    Not those that a run has chosen by name."""
    names = [
        name
        for name, column in table.columns.items()
        if column.kind == "number" and column.whole and is_named_id(name) and name not in chosen
    ]
    values: dict[str, list[Any]] = {name: [] for name in names}
    for batch in reader.batches(names) if names else ():
        for name in names:
            found = column_types.numbers(batch.column(name), "number")
            values[name].append(found[~np.isnan(found)])
    counts = {name: np.concatenate(parts) for name, parts in values.items() if parts}
    return {
        name for name, one in counts.items() if len(one) > 1 and len(np.unique(one)) == len(one)
    }


def _may_be_sparse(moments: Moments, low: float, high: float, min_rows: int) -> bool:
    """False if too many rows differ: each of them adds at most the square of the range."""
    return low < high and moments.m2 < min_rows * (high - low) ** 2


def _allowed(there: Sequence[str], patterns: Sequence[str], wanted: TableSettings) -> list[str]:
    """The requested columns that may be used. Raises SchemaMismatch, which names all others."""
    # A column without a name, such as the index of pandas, is in no list of columns.
    allowed = [name for name in there if name and may_use(name, patterns)]
    misfits: list[SchemaMismatch] = []
    for name in filter(None, (wanted.target, wanted.split_by, *wanted.features)):
        if name not in there:
            hint = f"there are {', '.join(there[:20])}"
            mismatches.add_absent(misfits, name, "a column of this name", allowed, hint)
        elif not may_use(name, patterns):
            misfits.append(_column_withheld(name))
    if misfits:
        raise SchemaMismatch.of_all(misfits)
    asked = {wanted.target, *wanted.features} if wanted.features else set(allowed)
    if wanted.split_by not in wanted.features:  # nothing of the column leaves
        asked.discard(wanted.split_by)
    return [name for name in allowed if name in asked]


def may_use(name: str, patterns: Sequence[str]) -> bool:
    """True if the owner allows the use of this column."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_columns(
    there: Sequence[str], data: DataSettings, made: Preprocessing, split_by: str = ""
) -> None:
    """Raise SchemaMismatch if a preprocessing, which comes from the coordinator, or `split_by` name
    a column of the table that the owner keeps back."""
    named = {made.target.name, split_by, *(feature.name for feature in made.features)}
    withheld = [name for name in there if name in named and not may_use(name, data.columns)]
    if withheld:
        raise SchemaMismatch.of_all([_column_withheld(name) for name in withheld])


def _column_withheld(name: str) -> SchemaMismatch:
    found = "one that its owner keeps back"
    hint = "commonweight-agent task allow TASK --columns, within policy set data.columns"
    return SchemaMismatch(f"column {name}", "a column that runs may use", found, hint)


def check_table(
    reader: Reader, data: DataSettings, made: Preprocessing, wanted: TableSettings
) -> None:
    """Raise SchemaMismatch, which names the columns, if a table does not fit the preprocessing."""
    features = {feature.name: feature.kind for feature in made.features}
    expected = {**features, made.target.name: made.target.kind}
    there = reader.columns()
    _allowed(there, data.columns, wanted)
    check_columns(there, data, made)
    if features.keys().isdisjoint(there):
        raise mismatches.no_common_feature(
            features,
            [n for n in there if n != made.target.name and may_use(n, data.columns)],
        )
    names = [name for name in there if name in expected]
    misfits = []
    for name, kinds in (reader.aggregate(KindAggregation(), names) or {}).items():
        kind, agreed = kinds.kind, expected[name]
        if not (mismatches.is_alike(kind, agreed) or agreed == "text"):
            column = ColumnStatistics(kind=kind, written=kinds.written)
            found = statistics.describe_kind(column)
            misfits.append(SchemaMismatch(f"column {name}", agreed, found))
    if misfits:
        raise SchemaMismatch.of_all(misfits)
