"""Computes the statistics of a query over the batches of a table, in bounded memory.

Rows are numbered in the reader's order, so that disclosure rules can compare the rows of cells.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from agent.data import Reader
from agent.data.column_types import PossibleKinds, numbers, possible_kinds, texts
from protocols.analytics import mergeable_states, sketches
from protocols.analytics.mergeable_states import CountState, MomentsState, RangeState, State
from protocols.analytics.query import Condition, Operation, Query
from protocols.errors import UnknownName, UsageError
from protocols.tables.statistics import ColumnKind, compute_moments

Group = tuple[str | None, ...]
Rows = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

#: Operations that need numbers, or dates as days.
_OF_NUMBERS = frozenset(
    {"sum", "mean", "var", "std", "min", "max", "cov", "corr", "quantile", "histogram"}
)
#: The most groups in one answer: a column of names or keys cannot be grouped by.
MAX_GROUPS = 2000


class GroupedResult(NamedTuple):
    """Groups with their states; `members` are the rows of each, as a mask over all `rows`."""

    rows: int
    kinds: dict[str, ColumnKind]
    cells: dict[Group, tuple[State, ...]]
    members: dict[Group, Rows]


def compute(question: Query, reader: Reader) -> GroupedResult:
    """The statistics of every group. Raises UnknownName, UsageError, DataError."""
    columns = question.columns
    known = reader.columns()
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"near: {', '.join(near)}" if near else ""
            raise UnknownName(f"this peer's table has no column {name!r}", hint)
    held = _kinds(reader, columns)
    for operation in question.operations:
        for name in operation.columns:
            if operation.kind in _OF_NUMBERS and held[name] == "text":
                raise UsageError(f"{operation} needs numbers, and {name!r} holds text")
    cells: dict[Group, tuple[State, ...]] = {}
    places: dict[Group, list[Places]] = {}
    rows = 0
    # A count names no column; the first column of the table stands for its rows.
    for batch in reader.batches(columns or known[:1]):
        table = _Batch(batch, held)
        where = table.mask(question.where)
        for group, place in table.groups(question.by, where):
            found = tuple(
                _state(operation, table, place, question.bounds)
                for operation in question.operations
            )
            old = cells.get(group)
            if old is None and len(cells) >= MAX_GROUPS:
                raise UsageError(f"more than {MAX_GROUPS} groups", "group by fewer, rounder values")
            cells[group] = (
                found
                if old is None
                else tuple(mergeable_states.merge(pair) for pair in zip(old, found, strict=True))
            )
            places.setdefault(group, []).append(place + rows)
        rows += batch.num_rows
    members = {group: np.zeros(rows, bool) for group in places}
    for group, parts in places.items():
        members[group][np.concatenate(parts)] = True
    return GroupedResult(rows, held, cells, members)


def _kinds(reader: Reader, columns: Sequence[str]) -> dict[str, ColumnKind]:
    found = {name: PossibleKinds() for name in columns}
    if columns:
        for batch in reader.batches(columns):
            for name in columns:
                found[name] = found[name].merge(possible_kinds(batch.column(name)))
    return {name: kind.kind for name, kind in found.items()}


class _Batch:
    """One batch, whose columns are converted to numbers or texts on first use."""

    def __init__(self, batch: pa.RecordBatch, held: dict[str, ColumnKind]) -> None:
        self._batch, self._held = batch, held
        self._numbers: dict[str, mergeable_states.Floats] = {}

    def numbers(self, name: str) -> mergeable_states.Floats:
        if name not in self._numbers:
            self._numbers[name] = numbers(self._batch.column(name), self._held[name])
        return self._numbers[name]

    def texts(self, name: str) -> pa.StringArray:
        return texts(self._batch.column(name))

    def missing(self, name: str) -> Rows:
        """A mask of missing values."""
        if self._held[name] in ("text", "empty"):
            return _mask(self.texts(name).is_null())
        return np.isnan(self.numbers(name))

    def mask(self, conditions: Iterable[Condition]) -> Rows:
        """A mask of the rows for which all conditions hold; a missing value meets none."""
        kept = np.ones(self._batch.num_rows, bool)
        for condition in conditions:
            kept &= self._holds(condition)
        return kept

    def _holds(self, condition: Condition) -> Rows:
        name, values = condition.column, condition.values
        numeric = all(isinstance(value, float) for value in values)
        if numeric and self._held[name] != "text":
            column = self.numbers(name)
            with np.errstate(invalid="ignore"):
                if condition.comparison == "in":
                    return np.isin(column, np.array(values, np.float64))
                return _COMPARE[condition.comparison](column, float(values[0])) & ~np.isnan(column)
        if condition.comparison not in ("==", "!=", "in"):
            raise UsageError(f"{name!r} holds text, which has no order here", "use == or in")
        plain = [f"{v:.0f}" if isinstance(v, float) and v == int(v) else str(v) for v in values]
        column = self.texts(name)
        found = _mask(pc.is_in(column, value_set=pa.array(plain, pa.string())))
        return ~found & ~_mask(column.is_null()) if condition.comparison == "!=" else found

    def groups(
        self, by: Sequence[str], where: Rows
    ) -> Iterable[tuple[Group, npt.NDArray[np.intp]]]:
        """The groups among the rows of `where`, with the indices of their rows."""
        places = np.flatnonzero(where)
        if not by:
            yield (), places
            return
        keys = [self.texts(name).take(pa.array(places)).to_pylist() for name in by]
        found: dict[Group, list[int]] = {}
        for place, key in zip(places.tolist(), zip(*keys, strict=True), strict=True):
            found.setdefault(key, []).append(place)
        for group, members in found.items():
            yield group, np.array(members, np.intp)


def _mask(column: pa.Array) -> Rows:
    return np.asarray(column.fill_null(False).to_numpy(zero_copy_only=False), bool)


_COMPARE = {
    "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal,
    ">": np.greater, ">=": np.greater_equal,
}  # fmt: skip


def _state(
    operation: Operation, table: _Batch, place: Places, bounds: Mapping[str, tuple[float, float]]
) -> State:
    """An operation's state over the rows at these places, values clipped to their bounds."""
    if operation.kind == "count":
        return CountState(len(place))
    name = operation.columns[0]
    if operation.kind == "missing":
        return CountState(int(table.missing(name)[place].sum()))
    if operation.kind == "distinct":
        told = pc.unique(table.texts(name).take(pa.array(place)).drop_null())
        return sketches.count_distinct(told.to_pylist())
    values = table.numbers(name)[place]
    if operation.kind in ("cov", "corr"):
        other = table.numbers(operation.columns[1])[place]
        both = ~np.isnan(values) & ~np.isnan(other)
        return mergeable_states.compute_comoments(values[both], other[both])
    values = values[~np.isnan(values)]
    if name in bounds:
        values = np.clip(values, *bounds[name])
    match operation.kind:
        case "min" | "max":
            if not len(values):
                return RangeState()
            return RangeState(float(values.min()), float(values.max()))
        case "quantile":
            return mergeable_states.sketch_quantiles(values)
        case "histogram" if len(operation.args) == 3:
            bins, least, most = operation.args
            return mergeable_states.compute_histogram(values, int(bins), least, most)
        case "histogram":
            return mergeable_states.sketch_quantiles(values)
        case _:
            return MomentsState(compute_moments(values))
