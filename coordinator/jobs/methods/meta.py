"""Random-effects meta-analysis of the peers' own estimates. Pure.

DerSimonian and Laird, Meta-analysis in clinical trials, 1986; I² by Higgins and Thompson, 2002. The
owner of each machine has to allow that its estimate is shown (the operation `estimates`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from coordinator.jobs.methods.counts import sort_levels
from coordinator.jobs.methods.distributions import REACH_95, chi2_p, normal_p
from coordinator.jobs.methods.plots import draw_forest
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import Plan, Statistics, Value, make_table
from protocols.analytics.mergeable_states import MomentsState, PeerAnswer
from protocols.analytics.query import Operation
from protocols.errors import CannotBeMet, UsageError
from protocols.tables.statistics import Moments


class Pooled(NamedTuple):
    """The random-effects estimate, and how much the peers differ."""

    estimate: float
    error: float
    tau2: float
    q: float
    i2: float


def pool(estimates: list[float], variances: list[float]) -> Pooled:
    """The random-effects estimate of at least two."""
    y, v = np.array(estimates), np.array(variances)
    w = 1 / v
    q = float((w * (y - (w * y).sum() / w.sum()) ** 2).sum())
    df = len(y) - 1
    tau2 = max(0.0, (q - df) / float(w.sum() - (w * w).sum() / w.sum()))
    w = 1 / (v + tau2)
    estimate, error = float((w * y).sum() / w.sum()), math.sqrt(1 / float(w.sum()))
    return Pooled(estimate, error, tau2, q, max(0.0, (q - df) / q) if q else 0.0)


def meta(method: Method) -> Plan:
    """The mean of each peer, the difference of two groups, or their log odds ratio."""
    measure = method.options.get("measure", "difference")
    if measure not in ("difference", "odds") or (measure == "odds" and not method.by):
        raise UsageError("a measure is difference or odds", "meta(died by sex, measure=odds)")
    operations = (Operation("estimates"), Operation("var", method.columns))
    merged = yield method.query(*operations, by=(method.by,) if method.by else ())
    levels = sort_levels({group[0] for group in merged.cells if group and group[0] is not None})
    if method.by and len(levels) != 2:
        raise UsageError(f"a difference is of two groups, and {method.by!r} has {len(levels)}")
    found: dict[str, tuple[int, float, float]] = {}
    for peer, answer in merged.used.items():
        one = _estimate(answer, levels, measure == "odds")
        if one is not None:
            found[method.peer_names.get(peer, peer)] = one
    if len(found) < 2:
        raise CannotBeMet("fewer than two peers have enough rows in each group")
    _, estimates, variances = map(list, zip(*found.values(), strict=True))
    pooled = pool(estimates, variances)
    rows: list[list[Value]] = []
    plot: list[tuple[str, float, float, float]] = []
    weights = 1 / (np.array(variances) + pooled.tau2)
    for (name, (count, value, variance)), share in zip(
        found.items(), (weights / weights.sum()).tolist(), strict=True
    ):
        half = REACH_95 * math.sqrt(variance)
        rows.append([name, count, value, math.sqrt(variance), value - half, value + half, share])
        plot.append((name, value, value - half, value + half))
    half, z = REACH_95 * pooled.error, pooled.estimate / pooled.error
    ends = (pooled.estimate - half, pooled.estimate + half)
    df = len(found) - 1
    total = [pooled.estimate, pooled.error, z, normal_p(z), *ends]
    titles = ("estimate", "SE", "z", "p", "2.5 %", "97.5 %", "tau2", "I2", "Q", "df", "p of Q")
    spread = [pooled.tau2, pooled.i2, pooled.q, df, chi2_p(pooled.q, df)]
    return Statistics(
        method=method.text,
        tables=(
            make_table(titles, [[*total, *spread]]),
            make_table(
                ("peer", "rows", "estimate", "SE", "2.5 %", "97.5 %", "weight"), rows, "peers"
            ),
        ),
        notes=(_words(method, levels, measure == "odds"),),
        plot=tuple(draw_forest([*plot, ("all", pooled.estimate, *ends)])),
    )


def _words(method: Method, levels: list[str], is_odds: bool) -> str:
    (column,) = method.columns
    if not levels:
        return f"Means of {column}."
    if is_odds:
        return f"Log odds ratios of {column}: {levels[0]} beside {levels[1]}."
    return f"Differences of the means of {column}: {levels[0]} less {levels[1]}."


def _estimate(
    answer: PeerAnswer, levels: list[str], is_odds: bool
) -> tuple[int, float, float] | None:
    """The rows, the estimate and its variance of one peer; None if a group has too few rows."""
    parts: dict[str, Moments] = {}
    for cell in answer.cells:
        state = cell.states[1]
        if isinstance(state, MomentsState) and state.moments.count > 1:
            parts[(cell.group or ("",))[0] or ""] = state.moments
    if any(level not in parts for level in levels or [""]):
        return None
    moments = [parts[level] for level in levels or [""]]
    count = sum(one.count for one in moments)
    if is_odds:
        events = [round(one.mean * one.count) for one in moments]
        cells = [n for e, one in zip(events, moments, strict=True) for n in (e, one.count - e)]
        if min(cells) <= 0:
            return None
        a, b, c, d = cells
        return count, math.log(a * d / (b * c)), sum(1 / n for n in cells)
    variance = sum(one.m2 / (one.count - 1) / one.count for one in moments)
    if not variance:
        return None
    difference = moments[0].mean - (moments[1].mean if len(moments) > 1 else 0.0)
    return count, difference, variance
