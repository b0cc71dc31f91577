"""Methods over means and covariances: t-test, analysis of variance, correlations, PCA. Pure.

Formulas as in `scipy.stats` (ttest_ind, f_oneway, pearsonr) and scikit-learn's PCA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator

import numpy as np

from coordinator.jobs.analysis import Merged
from coordinator.jobs.methods.distributions import REACH_95, f_p, t_p, t_quantile
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import Plan, ResultTable, Statistics, make_table, pick_states
from protocols.analytics.mergeable_states import ComomentsState, MomentsState
from protocols.analytics.query import Operation, Query
from protocols.errors import CannotBeMet, UsageError
from protocols.tables.statistics import Moments


def ask_groups(method: Method) -> Generator[Query, Merged, dict[str, Moments]]:
    """The moments of the method's column by group."""
    merged = yield method.query(Operation("var", method.columns), by=(method.by,))
    states = pick_states(merged, 0, MomentsState)
    groups = {
        values[0]: state.moments
        for values, state in states.items()
        if values[0] is not None and state.moments.count > 1
    }
    if len(groups) < 2:
        raise CannotBeMet(
            f"{method.by!r} has fewer than two groups with enough rows", "choose another column"
        )
    return groups


def ttest(method: Method) -> Plan:
    """Welch's t-test and Student's, two-sided, with the difference of the means."""
    groups = yield from ask_groups(method)
    if len(groups) != 2:
        raise UsageError(
            f"a t-test compares two groups, and {method.by!r} has {len(groups)}",
            f"anova({method.columns[0]} by {method.by})",
        )
    a, b = groups.values()
    difference = a.mean - b.mean
    parts = [one.m2 / (one.count - 1) / one.count for one in (a, b)]
    pooled = (a.m2 + b.m2) / (a.count + b.count - 2)
    both = {
        "Welch": (
            math.sqrt(sum(parts)),
            sum(parts) ** 2
            / (sum(p**2 / (one.count - 1) for p, one in zip(parts, (a, b), strict=True)) or 1),
        ),
        "Student": (math.sqrt(pooled * (1 / a.count + 1 / b.count)), a.count + b.count - 2.0),
    }
    rows = []
    for name, (error, df) in both.items():
        if not error:
            raise CannotBeMet("all values of each group are alike", "choose another column")
        t, reach = difference / error, t_quantile(0.975, df) * error
        ends = (difference - reach, difference + reach)
        rows.append((name, difference, error, t, df, t_p(t, df), *ends))
    return Statistics(
        method=method.text,
        tables=(
            make_table(("test", "difference", "SE", "t", "df", "p", "2.5 %", "97.5 %"), rows),
            describe(groups, method.by),
        ),
    )


def describe(groups: dict[str, Moments], by: str) -> ResultTable:
    """A table of the groups' rows, means and standard deviations."""
    return make_table(
        (by, "rows", "mean", "std"),
        (
            (name, one.count, one.mean, math.sqrt(one.m2 / (one.count - 1)))
            for name, one in groups.items()
        ),
        "groups",
    )


def f_test(groups: list[Moments]) -> tuple[float, int, int, float, float]:
    """F, both degrees of freedom, and the sums of squares between and within groups."""
    count = sum(one.count for one in groups)
    mean = sum(one.count * one.mean for one in groups) / count
    between = sum(one.count * (one.mean - mean) ** 2 for one in groups)
    within = sum(one.m2 for one in groups)
    df1, df2 = len(groups) - 1, count - len(groups)
    return (between / df1) / (within / df2) if within else math.inf, df1, df2, between, within


def anova(method: Method) -> Plan:
    """One-way analysis of variance."""
    groups = yield from ask_groups(method)
    f, df1, df2, between, within = f_test([*groups.values()])
    rows = [
        ("between", between, df1, between / df1, f, f_p(f, df1, df2)),
        ("within", within, df2, within / df2, None, None),
    ]
    table = make_table(("variation", "sum of squares", "df", "mean square", "F", "p"), rows)
    return Statistics(method=method.text, tables=(table, describe(groups, method.by)))


# --- several columns -------------------------------------------------------------------------


def _ask_pairs(
    method: Method,
) -> Generator[Query, Merged, dict[tuple[str, str], ComomentsState]]:
    """The comoments of each pair of columns."""
    pairs = [*itertools.combinations(method.columns, 2)]
    merged = yield method.query(*(Operation("cov", pair) for pair in pairs))
    found = {}
    for place, pair in enumerate(pairs):
        state = pick_states(merged, place, ComomentsState).get(())
        if state is None or state.x.count < 4:
            raise CannotBeMet(f"no peer has enough rows for {pair[0]} and {pair[1]}")
        if not state.x.m2 or not state.y.m2:
            raise CannotBeMet(f"all values of {pair[0]} or {pair[1]} are alike")
        found[pair] = state
    return found


def _correlation(state: ComomentsState) -> float:
    return max(-1.0, min(1.0, state.c / math.sqrt(state.x.m2 * state.y.m2)))


def corr(method: Method) -> Plan:
    """Pearson correlations of all pairs, over the rows that have both values."""
    pairs = yield from _ask_pairs(method)
    r = {pair: _correlation(state) for pair, state in pairs.items()}
    matrix = [
        [a, *(1.0 if a == b else r.get((a, b), r.get((b, a))) for b in method.columns)]
        for a in method.columns
    ]
    rows = []
    for (a, b), state in pairs.items():
        value, count = r[a, b], state.x.count
        rest = 1 - value * value
        t = value * math.sqrt((count - 2) / rest) if rest else math.inf
        ends = (value, value)
        if rest and count > 3:
            reach = REACH_95 / math.sqrt(count - 3)
            ends = (math.tanh(math.atanh(value) - reach), math.tanh(math.atanh(value) + reach))
        rows.append((a, b, count, value, t_p(t, count - 2), *ends))
    return Statistics(
        method=method.text,
        tables=(
            make_table(("a", "b", "rows", "r", "p", "2.5 %", "97.5 %"), rows),
            make_table(("column", *method.columns), matrix, "matrix"),
        ),
    )


def pca(method: Method) -> Plan:
    """Principal components of the standardized columns."""
    pairs = yield from _ask_pairs(method)
    if len({state.x.count for state in pairs.values()}) > 1:
        raise CannotBeMet(
            "columns have missing values in different rows, and components need rows with all",
            "leave the column with missing values out",
        )
    width = len(method.columns)
    matrix = np.eye(width)
    for (a, b), state in pairs.items():
        i, j = method.columns.index(a), method.columns.index(b)
        matrix[i, j] = matrix[j, i] = _correlation(state)
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(width)])
    names = [f"PC{number + 1}" for number in range(width)]
    shares = values / values.sum()
    return Statistics(
        method=method.text,
        tables=(
            make_table(
                ("component", "variance", "share", "cumulated"),
                zip(names, values.tolist(), shares.tolist(), shares.cumsum().tolist(), strict=True),
            ),
            make_table(
                ("column", *names),
                ([n, *row] for n, row in zip(method.columns, vectors.tolist(), strict=True)),
                "loadings",
            ),
        ),
        notes=("The columns are standardized to mean 0 and variance 1.",),
    )
