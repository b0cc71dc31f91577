"""Reads the columns of a query and finds the rows of each cell.

Columns are held as float64 or as codes of texts, so the memory grows with the rows of the columns
that are asked for, and not with the whole table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data import Reader
from agent.data.column_types import PossibleKinds, numbers, possible_kinds, texts
from agent.data.profile import may_use
from protocols.analytics.mergeable_states import Floats
from protocols.analytics.query import Condition, Query
from protocols.errors import UnknownName, UsageError
from protocols.tables.statistics import ColumnKind

Group = tuple[str | None, ...]
Mask = npt.NDArray[np.bool_]
#: Places of rows in the reader's order.
Places = npt.NDArray[np.int64]

#: Operations that need numbers, or dates as days.
_OF_NUMBERS = frozenset(
    {"sum", "mean", "var", "std", "min", "max", "cov", "corr", "quantile", "histogram"}
)
#: The most groups in one answer: a column of names or keys cannot be grouped by.
MAX_GROUPS = 2000


class Column(NamedTuple):
    """One column: `values` are float64[n], NaN where missing, or none for text.

    `codes` are int64[n], -1 where missing: the place of each row's text in `words`.
    """

    kind: ColumnKind
    values: Floats | None
    codes: Places
    words: list[str]

    @property
    def missing(self) -> Mask:
        if self.kind in ("text", "empty") or self.values is None:
            return self.codes < 0
        return np.isnan(self.values)


class Table(NamedTuple):
    """The columns of a query. `width`: the number of all columns of the table."""

    rows: int
    width: int
    columns: dict[str, Column]

    def numbers(self, name: str) -> Floats:
        values = self.columns[name].values
        assert values is not None
        return values

    def num_values(self, name: str) -> int:
        """The number of different values in a column of numbers."""
        values = self.numbers(name)
        return len(np.unique(values[~np.isnan(values)]))


def read_table(question: Query, reader: Reader, allowed: Sequence[str]) -> Table:
    """The columns of the query. Raises UnknownName, UsageError, DataError."""
    names, known = question.columns, reader.columns()
    for name in names:
        if name not in known:
            usable = [column for column in known if may_use(column, allowed)]
            near = difflib.get_close_matches(name, usable, 3)
            hint = f"near: {', '.join(near)}" if near else ""
            raise UnknownName(f"this peer's table has no column {name!r}", hint)
    kinds = _kinds(reader, names)
    for operation in question.operations:
        for name in operation.columns:
            if operation.kind in _OF_NUMBERS and kinds[name] == "text":
                raise UsageError(f"{operation} needs numbers, and {name!r} holds text")
    as_texts = set(question.by)
    as_texts |= {c.column for c in question.where}
    as_texts |= {op.columns[0] for op in question.operations if op.kind in ("missing", "distinct")}
    as_texts |= {name for name, kind in kinds.items() if kind == "text"}
    rows = 0
    found: dict[str, tuple[list[Floats], list[Places], dict[str, int]]] = {
        name: ([], [], {}) for name in names
    }
    # A count names no column; the first column of the table stands for its rows.
    for batch in reader.batches(names or known[:1]):
        rows += batch.num_rows
        for name, (values, codes, words) in found.items():
            column = batch.column(name)
            if kinds[name] != "text":
                values.append(numbers(column, kinds[name]))
            if name in as_texts:
                encoded = texts(column).dictionary_encode()
                local = [words.setdefault(w, len(words)) for w in encoded.dictionary.to_pylist()]
                indices = encoded.indices.fill_null(len(local)).to_numpy(zero_copy_only=False)
                codes.append(np.array([*local, -1], np.int64)[indices])
    columns = {
        name: Column(
            kinds[name],
            np.concatenate(values) if values else None,
            np.concatenate(codes) if codes else np.zeros(0, np.int64),
            list(words),
        )
        for name, (values, codes, words) in found.items()
    }
    return Table(rows, len(known), columns)


def _kinds(reader: Reader, columns: Sequence[str]) -> dict[str, ColumnKind]:
    found = {name: PossibleKinds() for name in columns}
    if columns:
        for batch in reader.batches(columns):
            for name in columns:
                found[name] = found[name].merge(possible_kinds(batch.column(name)))
    return {name: kind.kind for name, kind in found.items()}


def find_cells(question: Query, table: Table) -> dict[Group, Places]:
    """The rows of each group for which all conditions hold. Raises UsageError."""
    places = np.flatnonzero(select(question.where, table))
    if not question.by:
        return {(): places}
    codes = np.stack([table.columns[name].codes[places] for name in question.by], axis=1)
    groups, group_of = np.unique(codes, axis=0, return_inverse=True)
    if len(groups) > MAX_GROUPS:
        raise UsageError(f"more than {MAX_GROUPS} groups", "group by fewer, rounder values")
    order = np.argsort(group_of.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(group_of.ravel(), minlength=len(groups)))[:-1]
    words = [table.columns[name].words for name in question.by]
    names = [
        tuple(None if code < 0 else word[code] for code, word in zip(row, words, strict=True))
        for row in groups.tolist()
    ]
    return dict(zip(names, np.split(places[order], ends), strict=True)) if names else {}


def select(conditions: Iterable[Condition], table: Table) -> Mask:
    """A mask of the rows for which all conditions hold; a missing value meets none."""
    kept = np.ones(table.rows, bool)
    for condition in conditions:
        kept &= _holds(condition, table.columns[condition.column])
    return kept


def _holds(condition: Condition, column: Column) -> Mask:
    values = condition.values
    if column.values is not None and all(isinstance(value, float) for value in values):
        with np.errstate(invalid="ignore"):
            if condition.comparison == "in":
                return np.isin(column.values, np.array(values, np.float64))
            compared = _COMPARE[condition.comparison](column.values, float(values[0]))
            return np.asarray(compared & ~np.isnan(column.values), bool)
    if condition.comparison not in ("==", "!=", "in"):
        raise UsageError(
            f"{condition.column!r} holds text, which has no order here", "use == or in"
        )
    wanted = {f"{v:.0f}" if isinstance(v, float) and v == int(v) else str(v) for v in values}
    hits = np.array([*(word in wanted for word in column.words), False])
    found = hits[column.codes]
    return ~found & (column.codes >= 0) if condition.comparison == "!=" else found


_COMPARE = {
    "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal,
    ">": np.greater, ">=": np.greater_equal,
}  # fmt: skip
