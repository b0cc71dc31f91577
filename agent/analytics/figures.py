"""The figures of one cell, and the sets of rows that each of them describes. Pure.

A cell has enough rows; a figure may still describe few of them. So a figure is withheld if fewer
than `min_rows` rows have a value; if all rows but fewer than that have the same one; if one of at
most three values, such as yes and no, belongs to fewer rows; or if one row dominates a sum. A cell
with no missing value and a cell with a few give the same kind of answer: where some of the table
are missing, `min_rows` rows are left out, some of them with a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from agent.analytics.compute import CutsOf, Mask, Places, Table
from agent.analytics.cut_points import CutPoints
from protocols.analytics import mergeable_states as stats
from protocols.analytics.mergeable_states import Floats, State, WithheldState
from protocols.analytics.model_states import MAX_TOLD_LEVELS, ColumnsState, LevelsState
from protocols.analytics.query import Operation
from protocols.analytics.row_sets import ones
from protocols.tables.statistics import compute_moments

#: The count, the sum and the sum of squares of a column with at most this many values tell how many
#: rows have each value.
MAX_SOLVABLE_VALUES = 3
#: A sum is withheld if all rows but the two largest are less than this part of the largest (the
#: p % rule of statistical offices, with p = 10).
_DOMINANCE = 0.1
#: A column of numbers with more values has no categories.
_MAX_NUMBER_LEVELS = 10
#: Quantiles come from at most this many buckets of a cell.
_MAX_BUCKETS = 32
#: Buckets are at most this wide, in keys of 1 % each: a factor of 1.9.
_MAX_BUCKET_KEYS = 64


#: A covariance tells the sum of one column's values, each times another column's value. With
#: the other column known, it is one more equation about the rows.
PRODUCTS = "\0products"


class ToldRows(NamedTuple):
    """A set of rows that a figure describes.

    `column`: the column that the figure is about; empty for any column; `PRODUCTS` for products
    of the values of two columns.
    """

    column: str
    rows: Places


class Figure(NamedTuple):
    """A figure and the sets of rows that it describes.

    `over`: the rows that its numbers are sums over, by the labels of `FigureRows`; empty: the rows
    of the cell.
    """

    state: State
    told: tuple[ToldRows, ...] = ()
    over: Mapping[str, Places] = {}


WITHHELD = Figure(WithheldState())


def compute_figure(
    operation: Operation, table: Table, rows: Places, cuts_of: CutsOf, min_rows: int
) -> Figure:
    """The figure over the rows at these places, which are in the order of their numbers.

    Raises Refused.
    """
    if operation.kind in ("count", "estimates"):
        return Figure(stats.CountState(len(rows)))
    if operation.kind == "columns":
        return Figure(ColumnsState(table.askable))
    missing = [table.columns[name].missing[rows] for name in operation.columns]
    gone = np.logical_or.reduce(missing)
    if operation.kind == "missing":
        # As in a histogram, few rows are shown as none.
        if gone.sum() < min_rows:
            return Figure(stats.CountState(0))
        if (~gone).sum() < min_rows:
            return Figure(stats.CountState(len(rows)))
        state = stats.CountState(int(gone.sum()))
        return Figure(state, (ToldRows(operation.columns[0], rows[gone]),))
    some_gone = any(table.columns[name].missing.any() for name in operation.columns)
    used = leave_out(rows, gone, some_gone, min_rows)
    if len(used) < min_rows:
        return WITHHELD
    found = _over_values(operation, table, used, cuts_of, min_rows)
    if isinstance(found.state, WithheldState):
        return found
    over = [ToldRows(name, used) for name in operation.columns]
    return Figure(found.state, (*over, *found.told), {"": used, **found.over})


def leave_out(rows: Places, gone: Mask, some_gone: bool, min_rows: int) -> Places:
    """The rows that are not `gone`. At least `min_rows` are left out if some of the table are."""
    used, count = rows[~gone], int(gone.sum())
    return used[min_rows - count :] if some_gone and count < min_rows else used


def _over_values(
    operation: Operation, table: Table, used: Places, cuts_of: CutsOf, min_rows: int
) -> Figure:
    """The figure over rows that have a value."""
    name = operation.columns[0]
    if (
        operation.kind in ("distinct", "levels", "histogram", "quantile")
        and len(used) < 2 * min_rows
    ):
        return WITHHELD  # it would say whether all of a few rows are alike
    if operation.kind == "distinct":
        counts = np.unique(table.columns[name].codes[used], return_counts=True)[1]
        common = int((counts >= min_rows).sum())
        rare = (len(counts) - common) // min_rows * min_rows
        return Figure(stats.DistinctState(common + rare, common + rare))
    if operation.kind == "levels":
        return _levels(table, name, used, min_rows)
    values = table.numbers(name)[used]
    match operation.kind:
        case "min" | "max":
            return Figure(stats.RangeState(float(values.min()), float(values.max())))
        case "histogram" if len(operation.args) == 3:
            return _histogram(operation, values, used, cuts_of(name), min_rows)
        case "quantile" | "histogram":
            return _quantiles(operation, values, used, min_rows)
    told: list[ToldRows] = []
    over: dict[str, Places] = {}
    for place, column in enumerate(operation.columns):
        part = table.numbers(column)[used]
        if np.isin(part, (0, 1)).all():
            over[ones(place)] = used[part == 1]
        if is_dominated(part):
            return WITHHELD
        different, counts = np.unique(part, return_counts=True)
        if counts.max() >= min_rows > len(part) - counts.max() and table.num_values(column) > 1:
            return WITHHELD
        if len(different) <= MAX_SOLVABLE_VALUES and (everywhere := table.num_values(column)) > 1:
            # Where the whole table has few values, a cell without one of them is withheld as
            # a cell where it is rare.
            lacks_one = len(different) < everywhere <= MAX_SOLVABLE_VALUES
            if counts.min() < min_rows or lacks_one:
                return WITHHELD
            # A covariance with yes and no tells the sum of the other column over those of yes.
            about = "" if len(operation.columns) > 1 else column
            told += [ToldRows(about, used[part == value]) for value in different]
    if operation.kind not in ("cov", "corr"):
        return Figure(stats.MomentsState(compute_moments(values)), tuple(told), over)
    if len(used) < min_product_rows(table, min_rows):
        return WITHHELD
    told.append(ToldRows(PRODUCTS, used))
    other = table.numbers(operation.columns[1])[used]
    return Figure(stats.compute_comoments(values, other), tuple(told), over)


def min_product_rows(table: Table, min_rows: int) -> int:
    """The fewest rows of a covariance. A covariance with another column is one equation about a
    column's values, and there must be more unknown values than equations."""
    return min_rows + table.width


def is_dominated(values: Floats) -> bool:
    """True if the largest of float64[n] follows from the sum to within the p % rule."""
    size = np.abs(values)
    if len(size) < 3:
        return False
    *_, second, first = np.partition(size, (-2, -1))
    return bool(size.sum() - first - second < _DOMINANCE * first)


# --- histograms ------------------------------------------------------------------------------


def _histogram(
    operation: Operation, values: Floats, used: Places, cuts: CutPoints, min_rows: int
) -> Figure:
    """Counts in equal bins. A bin with few rows counts as empty, as do others to hide its size.
    Edges are cuts."""
    bins, low, high = int(operation.args[0]), operation.args[1], operation.args[2]
    bin_of = np.searchsorted(cuts.edges(low, high, bins), values, side="right")
    counts = np.bincount(bin_of, minlength=bins + 2)
    told = _large_enough(counts, min_rows)
    counts[np.setdiff1d(np.arange(len(counts)), told)] = 0
    names = [bins, *range(bins), bins + 1]  # as sums have them: first the bins
    rows = {str(names[i]): used[bin_of == i] for i in told}
    sets = tuple(ToldRows(operation.columns[0], some) for some in rows.values())
    state = stats.HistogramState(tuple(counts[1:-1].tolist()), int(counts[0]), int(counts[-1]))
    return Figure(state, sets, rows)


def _large_enough(counts: Places, min_rows: int) -> list[int]:
    """The places of counts that may be released: not few, and not all but few of the others."""
    hidden = set(np.flatnonzero((counts > 0) & (counts < min_rows)).tolist())
    told = sorted(set(np.flatnonzero(counts).tolist()) - hidden, key=lambda i: (counts[i], i))
    while told and hidden and sum(counts[i] for i in hidden) < min_rows:
        hidden.add(told.pop(0))
    return told


def _levels(table: Table, name: str, used: Places, min_rows: int) -> Figure:
    """The categories that enough rows have. A column of many numbers has none."""
    column = table.columns[name]
    codes = column.codes[used]
    counts = np.bincount(codes, minlength=len(column.words))
    told = _large_enough(counts, min_rows)
    has_many = column.values is not None and table.num_values(name) > _MAX_NUMBER_LEVELS
    if has_many or len(told) > MAX_TOLD_LEVELS:
        return Figure(LevelsState())
    rows = {column.words[code]: used[codes == code] for code in told}
    sets = tuple(ToldRows(name, some) for some in rows.values())
    return Figure(LevelsState({word: len(some) for word, some in rows.items()}), sets, rows)


def _quantiles(operation: Operation, values: Floats, used: Places, min_rows: int) -> Figure:
    """Rows in buckets of at least `min_rows`, each spread evenly over the bins of its bucket.

    The buckets are halves of halves of the range of all numbers, so their edges reveal no value. A
    half with fewer than `min_rows` rows gets none: they count in the other half.
    """
    keys = stats.quantile_keys(values)
    order = np.argsort(keys, kind="stable")
    keys, used = keys[order], used[order]
    least = max(min_rows, -(-len(keys) // _MAX_BUCKETS))
    counts: dict[int, int] = {}
    told = []
    todo = [(0, len(keys), -stats.MAX_KEY, stats.MAX_KEY)]
    while todo:
        start, stop, low, high = todo.pop()
        middle = (low + high) // 2
        cut = int(np.clip(np.searchsorted(keys, middle), start, stop))
        smaller, is_wide = min(cut - start, stop - cut), high - low > _MAX_BUCKET_KEYS
        if high - low > 1 and smaller >= min_rows and (is_wide or stop - start > least):
            todo += [(start, cut, low, middle), (cut, stop, middle, high)]
        elif high - low > 1 and smaller < min_rows and (is_wide or stop - start >= 2 * min_rows):
            half = (low, middle) if cut - start >= stop - cut else (middle, high)
            todo.append((start, stop, *half))
        else:
            for key, count in stats.spread_bucket(low, high, stop - start).items():
                counts[key] = counts.get(key, 0) + count
            told.append(ToldRows(operation.columns[0], used[start:stop]))
    return Figure(stats.quantile_state(counts), tuple(told))


# --- figures that get noise ------------------------------------------------------------------


def compute_clipped(
    operation: Operation, table: Table, rows: Places, bounds: Mapping[str, tuple[float, float]]
) -> State:
    """The figure over all rows of a cell with values clipped to their bounds, before noise."""
    if operation.kind == "count":
        return stats.CountState(len(rows))
    name = operation.columns[0]
    if operation.kind == "missing":
        return stats.CountState(int(table.columns[name].missing[rows].sum()))
    values = table.numbers(name)[rows]
    values = values[~np.isnan(values)]
    if operation.kind == "histogram":
        bins, low, high = int(operation.args[0]), operation.args[1], operation.args[2]
        counts = np.bincount(stats.bin_values(values, bins, low, high), minlength=bins + 2)
        return stats.HistogramState(tuple(counts[1:-1].tolist()), int(counts[0]), int(counts[-1]))
    return stats.MomentsState(compute_moments(np.clip(values, *bounds[name])))
