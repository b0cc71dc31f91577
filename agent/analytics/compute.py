"""Reads the columns of a query and finds the rows of each cell.

Columns are held as float64 or as codes of texts, so the memory grows with the rows of the columns
that are asked for, and not with the whole table.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec import UNSET

from agent.analytics.cut_points import CutPoints
from agent.data import Reader
from agent.data.column_types import PossibleKinds, num_values, numbers, possible_kinds, texts
from agent.data.profile import may_use
from protocols.analytics.mergeable_states import Floats
from protocols.analytics.query import Condition, Operation, Query
from protocols.errors import UnknownName, UsageError
from protocols.tables.statistics import ColumnKind

Group = tuple[str | None, ...]
Mask = npt.NDArray[np.bool_]
#: Places of rows in the reader's order.
Places = npt.NDArray[np.int64]
#: The cuts of a column of numbers, by its name.
CutsOf = Callable[[str], CutPoints]

#: Operations that need numbers, or dates as days.
_OF_NUMBERS = frozenset(
    {"sum", "mean", "var", "std", "min", "max", "cov", "corr", "quantile", "histogram"}
    | {"survival", "glm", "cox"}
)
#: The most groups in one answer. A query cannot group by a column of names or keys.
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
        return self.codes < 0 if self.values is None else np.isnan(self.values)


class Table(NamedTuple):
    """The columns of a query. `width`: the number of all columns of the table.

    `askable`: the names of the columns that the owner allows in questions.
    """

    rows: int
    width: int
    columns: dict[str, Column]
    askable: tuple[str, ...] = ()

    def numbers(self, name: str) -> Floats:
        values = self.columns[name].values
        assert values is not None
        return values

    def num_values(self, name: str) -> int:
        """The number of different values in a column of numbers."""
        values = self.numbers(name)
        return len(np.unique(values[~np.isnan(values)]))


def read_table(question: Query, reader: Reader, allowed: Sequence[str], min_rows: int = 1) -> Table:
    """The columns of the query. Raises UnknownName, UsageError, DataError.

    A column in which fewer than `min_rows` rows have a value counts as empty.
    """
    names, known = question.columns, reader.columns()
    for name in names:
        if name not in known:
            usable = [column for column in known if may_use(column, allowed)]
            near = difflib.get_close_matches(name, usable, 3)
            hint = f"near: {', '.join(near)}" if near else ""
            raise UnknownName(f"this peer's table has no column {name!r}", hint)
    kinds = _kinds(reader, names, min_rows)
    for operation in question.operations:
        for name in operation.columns:
            needs_numbers = operation.kind in _OF_NUMBERS and name not in _categories(operation)
            if needs_numbers and kinds[name] == "text":
                raise UsageError(f"{operation} needs numbers, and {name!r} holds text")
    as_texts = set(question.by)
    as_texts |= {c.column for c in question.where}
    for operation in question.operations:
        as_texts |= _categories(operation)
        if operation.kind in ("missing", "distinct", "levels"):
            as_texts.add(operation.columns[0])
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
            if kinds[name] == "empty":  # a few rows may have a value
                column = pa.nulls(len(column), pa.string())
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
    return Table(rows, len(known), columns, tuple(n for n in known if may_use(n, allowed)))


def _categories(operation: Operation) -> set[str]:
    """The columns of a model that have categories."""
    terms = operation.model.terms if operation.model is not UNSET else ()
    return {term.column for term in terms if term.categories}


def _kinds(reader: Reader, columns: Sequence[str], min_rows: int) -> dict[str, ColumnKind]:
    found = {name: PossibleKinds() for name in columns}
    counts = dict.fromkeys(columns, 0)
    if columns:
        for batch in reader.batches(columns):
            for name in columns:
                column = batch.column(name)
                found[name] = found[name].merge(possible_kinds(column))
                if counts[name] < min_rows:
                    counts[name] += num_values(column)
    return {
        name: kind.kind if counts[name] >= min_rows else "empty" for name, kind in found.items()
    }


class Cells(NamedTuple):
    """The rows of each group for which all conditions hold.

    `indivisible`: groups whose answer could show whether all of a few rows meet a condition.
    """

    rows: dict[Group, Places]
    indivisible: frozenset[Group] = frozenset()


def find_cells(question: Query, table: Table, cuts_of: CutsOf, min_rows: int) -> Cells:
    """The cells of a query. Raises UsageError, Refused.

    Fewer than 2 `min_rows` rows are not divided by a condition or a grouping column.
    """
    everything = np.ones(table.rows, bool)
    masks: dict[str, Mask] = {}
    for condition in question.where:
        mask = _holds(condition, table.columns[condition.column], cuts_of, min_rows)
        masks[condition.column] = masks.get(condition.column, everything) & mask
    selected = np.logical_and.reduce([everything, *masks.values()])
    group_of, codes = _group([table.columns[name] for name in question.by], table.rows)
    sizes = np.bincount(group_of[selected], minlength=len(codes))
    there = np.flatnonzero(sizes)
    if len(there) > MAX_GROUPS:
        raise UsageError(f"more than {MAX_GROUPS} groups", "group by fewer, rounder values")
    few = np.zeros(len(codes), bool)
    for name in masks:
        others = [mask for column, mask in masks.items() if column != name]
        undivided = np.logical_and.reduce([everything, *others])
        few |= np.bincount(group_of[undivided], minlength=len(codes)) < 2 * min_rows
    for column in range(len(question.by)):
        rest = np.delete(codes[there], column, 1)
        _, outer = np.unique(rest, axis=0, return_inverse=True)
        outer = outer.reshape(-1)
        few[there] |= np.bincount(outer, sizes[there])[outer] < 2 * min_rows
    words = [table.columns[name].words for name in question.by]
    names = [
        tuple(None if code < 0 else word[code] for code, word in zip(row, words, strict=True))
        for row in codes[there].tolist()
    ]
    places = np.flatnonzero(selected)
    order = places[np.argsort(group_of[places], kind="stable")]
    parts = np.split(order, np.cumsum(sizes[there])[:-1])
    found = dict(zip(names, parts, strict=True)) if names else {}
    indivisible = {name for name, is_few in zip(names, few[there], strict=True) if is_few}
    return Cells(found if question.by else {(): places}, frozenset(indivisible))


def _group(by: Sequence[Column], rows: int) -> tuple[Places, Places]:
    """The group of each row, int64[rows], and the codes of each group, int64[groups, columns]."""
    group_of, first = np.zeros(rows, np.int64), np.zeros(min(rows, 1), np.int64)
    for column in by:
        keys = group_of * (len(column.words) + 1) + column.codes
        _, first, group_of = np.unique(keys, return_index=True, return_inverse=True)
    codes = [column.codes[first] for column in by]
    return group_of, np.stack(codes, 1) if codes else np.zeros((len(first), 0), np.int64)


def _holds(condition: Condition, column: Column, cuts_of: CutsOf, min_rows: int) -> Mask:
    """A mask of the rows for which a condition holds; a missing value meets none.

    A value that fewer than `min_rows` rows have equals no value.
    """
    values, comparison = condition.values, condition.comparison
    if column.values is not None and all(isinstance(value, float) for value in values):
        there = ~np.isnan(column.values)
        if comparison in ("==", "!=", "in"):
            equal = np.zeros(len(there), bool)
            for value in {*values}:
                same = column.values == value
                if np.count_nonzero(same) >= min_rows:
                    equal |= same
            return there & ~equal if comparison == "!=" else equal
        threshold = float(values[0])
        if comparison in ("<=", ">"):
            threshold = math.nextafter(threshold, math.inf)
        cut = cuts_of(condition.column).cut(threshold)
        is_below = column.values < cut
        return there & (is_below if comparison in ("<", "<=") else ~is_below)
    if comparison not in ("==", "!=", "in"):
        raise UsageError(
            f"{condition.column!r} holds text, which has no order here", "use == or in"
        )
    wanted = {f"{v:.0f}" if isinstance(v, float) and v == int(v) else str(v) for v in values}
    counts = np.bincount(column.codes[column.codes >= 0], minlength=len(column.words))
    hits = [word in wanted and n >= min_rows for word, n in zip(column.words, counts, strict=True)]
    found = np.array([*hits, False])[column.codes]
    return ~found & (column.codes >= 0) if comparison == "!=" else found
