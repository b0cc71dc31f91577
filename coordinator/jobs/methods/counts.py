"""Methods over counts: chi-squared test, histogram, and the first table of a paper. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator

import numpy as np

from coordinator.jobs.analysis import Merged
from coordinator.jobs.methods import moments
from coordinator.jobs.methods.distributions import chi2_p, f_p
from coordinator.jobs.methods.plots import draw_bars
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import (
    Plan,
    Statistics,
    Value,
    batches,
    make_table,
    pick_states,
)
from protocols.analytics.mergeable_states import HistogramState, MomentsState
from protocols.analytics.model_states import ColumnsState, LevelsState
from protocols.analytics.query import MAX_OPERATIONS, Operation, Query
from protocols.errors import CannotBeMet, UsageError
from protocols.tables.statistics import Moments

#: A column of numbers has categories if it has at most this number of values.
_MAX_NUMBER_CATEGORIES = 5


def sort_levels(levels: set[str] | list[str]) -> list[str]:
    """Categories in the order of their numbers, or of their letters."""
    try:
        return sorted(levels, key=float)
    except ValueError:
        return sorted(levels)


def chi2_of(table: list[list[int]]) -> tuple[float, int, float]:
    """The statistic of Pearson's test without a correction, its degrees of freedom, and p."""
    counts = np.array(table, float)
    expected = counts.sum(1, keepdims=True) @ counts.sum(0, keepdims=True) / counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    df = (counts.shape[0] - 1) * (counts.shape[1] - 1)
    return statistic, df, chi2_p(statistic, df)


def chi2(method: Method) -> Plan:
    """Pearson's chi-squared test of independence."""
    merged = yield method.query(Operation("count"), by=method.columns)
    counts = {
        (a, b): rows
        for (a, b), (rows, _) in merged.cells.items()
        if a is not None and b is not None
    }
    first, second = (sort_levels({pair[i] for pair in counts}) for i in (0, 1))
    if len(first) < 2 or len(second) < 2:
        raise CannotBeMet("fewer than two categories of a column have enough rows")
    table = [[counts.get((a, b), 0) for b in second] for a in first]
    statistic, df, p = chi2_of(table)
    total = sum(map(sum, table))
    strength = math.sqrt(statistic / (total * min(len(first) - 1, len(second) - 1)))
    few = any(
        (a, b) not in {cell.group for cell in answer.cells}
        for answer in merged.used.values()
        for a, b in itertools.product(first, second)
    )
    notes = ["Combinations with too few rows at a peer are left out there: p is approximate."]
    return Statistics(
        method=method.text,
        tables=(
            make_table(
                ("chi2", "df", "p", "Cramér's V", "rows"), [(statistic, df, p, strength, total)]
            ),
            make_table(
                (f"{method.columns[0]} \\ {method.columns[1]}", *second),
                ([a, *row] for a, row in zip(first, table, strict=True)),
                "counts",
            ),
        ),
        notes=tuple(notes) if few else (),
    )


def hist(method: Method) -> Plan:
    """A histogram with round edges, from about 4 standard deviations below the mean to above."""
    (column,) = method.columns
    bins = method.options.get("bins", 20.0)
    if not isinstance(bins, float) or bins != int(bins) or not 1 <= bins <= 200:
        raise UsageError("a histogram has 1 to 200 bins", "hist(age, bins=20)")
    merged = yield method.query(Operation("var", (column,)))
    found = pick_states(merged, 0, MomentsState).get(())
    if found is None or found.moments.count < 2:
        raise CannotBeMet(f"no peer has enough rows with {column}")
    least, width = round_bins(found.moments, int(bins))
    ends = (least, least + width * bins)
    merged = yield method.query(Operation("histogram", (column,), (bins, *ends)))
    state = pick_states(merged, 0, HistogramState).get(())
    if state is None:
        raise CannotBeMet(f"no peer has enough rows with {column}")
    edges = [least + width * number for number in range(int(bins) + 1)]
    inside = zip(itertools.pairwise(edges), state.counts, strict=True)
    rows: list[tuple[Value, ...]] = [(*ends, count) for ends, count in inside]
    rows = [(None, edges[0], state.below), *rows, (edges[-1], None, state.above)]
    labels = [f"{edge:g}" for edge in edges[:-1]]
    return Statistics(
        method=method.text,
        tables=(make_table(("from", "to", "rows"), rows),),
        notes=("Few rows of a peer between two edges count in another bin, or in none.",),
        plot=tuple(draw_bars(labels, state.counts)),
    )


def round_bins(moments: Moments, bins: int) -> tuple[float, float]:
    """The least edge, and a round width, for these bins around the mean."""
    deviation = math.sqrt(moments.variance) or abs(moments.mean) or 1.0
    width = 8 * deviation / bins
    power = 10.0 ** math.floor(math.log10(width))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= width)
    return math.floor((moments.mean - width * bins / 2) / width) * width, width


# --- table 1 ---------------------------------------------------------------------------------


def ask_levels(method: Method, columns: tuple[str, ...]) -> Generator[Query, Merged, _Coding]:
    """The kind and the categories of each column."""
    kinds: dict[str, str] = {}
    levels: dict[str, list[str]] = {}
    for some in batches(columns, MAX_OPERATIONS):
        merged = yield method.query(*(Operation("levels", (name,)) for name in some))
        for answer in merged.used.values():
            kinds |= {name: kind for name, kind in answer.kinds.items() if kind != "empty"}
        for place, name in enumerate(some):
            state = pick_states(merged, place, LevelsState).get((), LevelsState())
            levels[name] = sort_levels([*state.counts])
    return kinds, levels


_Coding = tuple[dict[str, str], dict[str, list[str]]]


def table1(method: Method) -> Plan:
    """Means and standard deviations of numbers, and counts of categories, by group."""
    columns = method.columns
    if not columns:
        merged = yield method.query(Operation("columns"))
        state = pick_states(merged, 0, ColumnsState).get((), ColumnsState())
        columns = tuple(name for name in state.names if name != method.by)
    kinds, levels = yield from ask_levels(method, columns)
    operations = [op for op in (_summary(n, kinds, levels) for n in columns) if op is not None]
    left_out = [name for name in columns if _summary(name, kinds, levels) is None]
    rows: list[list[Value]] = []
    groups: list[str] = []
    for some in batches(operations, MAX_OPERATIONS):
        merged = yield method.query(*some, by=(method.by,))
        groups = sort_levels({values[0] for values in merged.cells if values[0] is not None})
        if not rows:
            sizes = [merged.cells[group,][0] for group in groups]
            rows.append(["rows", "", sum(sizes), *sizes, None])
        for place, operation in enumerate(some):
            name = operation.columns[0]
            if operation.kind == "levels":
                told = pick_states(merged, place, LevelsState)
                counts = [told.get((group,), LevelsState()) for group in groups]
                rows += _category_rows(name, levels[name], counts)
            else:
                parts = pick_states(merged, place, MomentsState)
                numbers = [parts.get((group,), MomentsState()).moments for group in groups]
                rows.append(_number_row(name, numbers))
    if not groups:
        raise CannotBeMet(f"no group of {method.by!r} has enough rows, or no column can be shown")
    notes = ["Numbers: mean (standard deviation), and p of an analysis of variance."]
    notes.append("Categories: rows (percent), and p of a chi-squared test. Few rows are not told.")
    if left_out:
        notes.append(f"Without categories and numbers: {', '.join(left_out)}.")
    titles = ("column", "value", "all", *(f"{method.by} = {group}" for group in groups), "p")
    return Statistics(method=method.text, tables=(make_table(titles, rows),), notes=tuple(notes))


def _summary(name: str, kinds: dict[str, str], levels: dict[str, list[str]]) -> Operation | None:
    """The question about a column; None for texts with too many values."""
    is_number = kinds.get(name) in ("number", "date")
    if levels[name] and not (is_number and len(levels[name]) > _MAX_NUMBER_CATEGORIES):
        return Operation("levels", (name,))
    return Operation("var", (name,)) if is_number else None


def _number_row(name: str, parts: list[Moments]) -> list[Value]:
    count = sum(one.count for one in parts)
    there = [one for one in parts if one.count > 1]
    p = None
    if len(there) > 1:
        f, df1, df2, *_ = moments.f_test(there)
        p = f_p(f, df1, df2)
    mean = sum(one.count * one.mean for one in parts) / count if count else 0.0
    m2 = sum(one.m2 + one.count * (one.mean - mean) ** 2 for one in parts)
    return [name, "", *map(_mean, [Moments(count, mean, m2), *parts]), p]


def _mean(one: Moments) -> str | None:
    if one.count < 2:
        return None
    return f"{one.mean:.6g} ({math.sqrt(one.m2 / (one.count - 1)):.4g})"


def _category_rows(name: str, levels: list[str], told: list[LevelsState]) -> list[list[Value]]:
    counts = [[state.counts.get(level, 0) for state in told] for level in levels]
    columns = [sum(column) for column in zip(*counts, strict=True)]
    shown = [j for j, total in enumerate(columns) if total]
    table = [[row[j] for j in shown] for row in counts if sum(row)]
    p = chi2_of(table)[2] if len(shown) > 1 and len(table) > 1 else None
    rows: list[list[Value]] = []
    for level, row in zip(levels, counts, strict=True):
        cells = [_percent(n, of) for n, of in zip(row, columns, strict=True)]
        everybody = _percent(sum(row), sum(columns))
        rows.append([name, level, everybody, *cells, None if rows else p])
    return rows


def _percent(count: int, of: int) -> str:
    return f"{count} ({100 * count / of:.1f} %)" if of else "–"
