"""What a peer refuses in a model: sums that describe a few rows.

Sums of a model are of products of two of its parts, or of one and the outcome. So each combination
of their categories is a set of rows that the sums describe.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from agent.analytics.compute import Places, Table
from agent.analytics.figures import MAX_SOLVABLE_VALUES, is_dominated
from protocols.analytics.mergeable_states import Floats
from protocols.analytics.models import Model
from protocols.analytics.query import Operation
from protocols.errors import Refused

#: The effective number of rows is at least this part of them.
_MAX_CONCENTRATION = 20

FEW = Refused("the coefficients of this question give a few rows most of the weight")
OUTSIDE = Refused("the coefficients of this question have no value for some rows")


class Used(NamedTuple):
    """The rows of a model: its outcome, float64[n] each; its terms, float64[n, p]; the columns with
    few values, as codes, int64[n]; and the sizes of the other columns, float64[n] each, not scaled:
    the requester chooses the scales."""

    rows: Places
    outcome: list[Floats]
    terms: Floats
    sizes: list[Floats]
    categories: dict[str, Places]


def crossings(
    operation: Operation, model: Model, categories: Collection[str]
) -> list[tuple[str, ...]]:
    """The sets of two or more columns with categories, of whose combinations a model tells sums.

    Sums are of products of two parts of the model, or of one and the outcome.
    """
    parts = [{model.terms[place].column for place in block} for block in model.blocks]
    parts += [{name} for name in operation.columns]
    unions = {
        frozenset((a | b).intersection(categories))
        for a, b in itertools.combinations_with_replacement(parts, 2)
    }
    return sorted(tuple(sorted(union)) for union in unions if len(union) > 1)


def cross(columns: Sequence[Places]) -> Places:
    """A code for each combination of the codes of these columns, int64[n]."""
    found = np.zeros_like(columns[0])
    for codes in columns:
        found = found * (int(codes.max()) + 1) + codes
    return found


def groups_of(operation: Operation, model: Model, used: Used) -> list[Places]:
    """The codes of the rows by each column with categories, and by each set that is crossed."""
    crossed = crossings(operation, model, used.categories)
    return [
        *used.categories.values(),
        *(cross([used.categories[name] for name in names]) for names in crossed),
    ]


def check_columns(
    operation: Operation, model: Model, table: Table, used: Used, min_rows: int
) -> None:
    """Raise Refused if the sums describe few rows: those of a category, or of two, or the largest.

    The times of a Cox model are only in bins.
    """
    for name in operation.columns:
        if name in used.categories or (model.family is None and name == operation.columns[0]):
            continue
        values = table.numbers(name)[used.rows]
        most = np.unique(values, return_counts=True)[1].max()
        if is_dominated(values) or len(values) - most < min_rows:
            raise Refused(f"the values of {name!r} here are nearly all alike, or one outweighs all")
    for name, codes in used.categories.items():
        counts = np.bincount(codes)
        if counts[counts > 0].min() < min_rows or np.count_nonzero(counts) < 2:
            raise Refused(f"too few rows here have some value of {name!r}")
    for names in crossings(operation, model, used.categories):
        columns = [used.categories[name] for name in names]
        counts = np.unique(cross(columns), return_counts=True)[1]
        possible = math.prod(len(np.unique(codes)) for codes in columns)
        if len(counts) < possible or counts.min() < min_rows:
            raise Refused(
                f"too few rows here have some combination of {' and '.join(map(repr, names))}"
            )
    outcome = [] if model.family is None else [np.abs(used.outcome[0])]
    for values in [*used.sizes, *outcome]:
        for codes in groups_of(operation, model, used):
            _check_groups(values, codes, min_rows)


def _check_groups(values: Floats, codes: Places, min_rows: int) -> None:
    """Raise Refused if the sum of float64[n] over a category is nearly the value of one row."""
    if len(np.unique(values)) <= MAX_SOLVABLE_VALUES:
        return
    for code in np.unique(codes):
        part = values[codes == code]
        most = np.unique(part, return_counts=True)[1].max()
        if is_dominated(part) or len(part) - most < min_rows:
            raise Refused(
                "in some category here, the values of a column are nearly all alike, or one "
                "outweighs all"
            )


def check_spread(weights: Floats, min_rows: int) -> None:
    """Raise Refused if few rows have most of the weight, by Kish's effective number of rows.

    The number grows with the rows; else a steep curve would make a sum that counts the rows above a
    threshold.
    """
    total, squares = weights.sum(), (weights * weights).sum()
    if not np.isfinite(total) or not np.isfinite(squares):
        raise OUTSIDE
    if total * total < max(min_rows, len(weights) / _MAX_CONCENTRATION) * squares:
        raise FEW


def find_parts(operation: Operation, model: Model, used: Used, min_rows: int) -> list[Places]:
    """The places of the rows with the event and of those without, for each time bin.

    Raises Refused if a part has few rows for the coefficients, or few of a category.
    """
    time, event = used.outcome
    bin_of = np.searchsorted(model.edges, time, side="right")
    parts, groups = [], groups_of(operation, model, used)
    for place, happened in itertools.product(range(len(model.edges) + 1), (1, 0)):
        part = np.flatnonzero((bin_of == place) & (event == happened))
        sizes = [np.bincount(codes[part]) for codes in groups]
        if 0 < len(part) < min_rows + len(model.at) or any(
            ((counts > 0) & (counts < min_rows)).any() for counts in sizes
        ):
            raise Refused(
                "too few rows here of some category, or of a combination of categories, have, or "
                f"do not have, {operation.columns[1]!r} in some time bin"
            )
        parts.append(part)
    return parts
