"""Kaplan-Meier curves, the log-rank test and Cox models over counts and sums by time bin. Pure.

Times in one bin are ties: an event is before the end of observation of another row. As `lifelines`
with the number of the bin as the time.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from coordinator.jobs.analysis import Merged
from coordinator.jobs.methods.coding import Floats
from coordinator.jobs.methods.counts import sort_levels
from coordinator.jobs.methods.distributions import REACH_95, chi2_p
from coordinator.jobs.methods.plots import draw_curves
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import (
    Plan,
    ResultTable,
    Statistics,
    Value,
    make_table,
    pick_states,
)
from protocols.analytics.mergeable_states import MomentsState
from protocols.analytics.model_states import SurvivalState, coarsen
from protocols.analytics.query import Operation, Query
from protocols.errors import CannotBeMet
from protocols.tables.statistics import Moments

FEWER = (
    "earlier questions about these columns limit the time bins, as all together describe enough "
    "rows; ask for km before cox, and for few groups"
)


def last_time(moments: Moments) -> float:
    """The power of 2 above nearly all times."""
    most = moments.mean + 2.5 * math.sqrt(moments.variance)
    if most <= 0 or moments.mean <= 0:
        raise CannotBeMet("times are not above 0")
    return 2.0 ** math.ceil(math.log2(most))


def ask_survival(method: Method) -> Generator[Query, Merged, dict[str, SurvivalState]]:
    """The counts of each group, all in the same bins."""
    time, event = method.columns[:2]
    merged = yield method.query(Operation("mean", (time,)))
    found = pick_states(merged, 0, MomentsState).get(())
    if found is None:
        raise CannotBeMet(f"no peer has enough rows with {time}")
    operation = Operation("survival", (time, event), (last_time(found.moments),))
    merged = yield method.query(operation, by=(method.by,) if method.by else ())
    states = pick_states(merged, 0, SurvivalState)
    groups = {
        (group[0] or "") if method.by else "all": state
        for group, state in states.items()
        if group != (None,)
    }
    if not groups:
        raise CannotBeMet("no peer has enough rows with and without the event", FEWER)
    edges = next(iter(groups.values())).edges
    for state in groups.values():
        edges = tuple(edge for edge in edges if edge in state.edges)
    return {name: coarsen(groups[name], edges) for name in sort_levels([*groups])}


class Curve(NamedTuple):
    """By bin: rows at risk, survival with its 95 % interval; and the bin of the median, if any."""

    at_risk: Floats
    survival: Floats
    low: Floats
    high: Floats
    median: int | None


def kaplan_meier(state: SurvivalState) -> Curve:
    """The product-limit estimate, with intervals by Greenwood's formula for log(-log S)."""
    events, censored = (np.array(part, np.float64) for part in (state.events, state.censored))
    leaving = events + censored
    at_risk = leaving.sum() - leaving.cumsum() + leaving
    with np.errstate(all="ignore"):
        survival: Floats = np.where(at_risk > 0, 1 - events / at_risk, 1.0).cumprod()
        greenwood = np.cumsum(events / (at_risk * (at_risk - events)))
        logs = np.log(survival)
        reach = REACH_95 * np.sqrt(greenwood) / logs
        inside = (survival > 0) & (survival < 1)
        low = np.where(inside, np.exp(-np.exp(np.log(-logs) - reach)), survival)
        high = np.where(inside, np.exp(-np.exp(np.log(-logs) + reach)), survival)
    below = np.flatnonzero(survival <= 0.5)
    return Curve(at_risk, survival, low, high, int(below[0]) if len(below) else None)


def log_rank(groups: list[SurvivalState]) -> tuple[float, int, Floats, Floats]:
    """Chi-squared, its degrees of freedom, and by group the events seen and expected."""
    events = np.array([state.events for state in groups], float)
    leaving = events + np.array([state.censored for state in groups])
    at_risk = leaving.sum(1, keepdims=True) - leaving.cumsum(1) + leaving
    n, d = at_risk.sum(0), events.sum(0)
    some = n > 1
    n, d, at_risk, events = n[some], d[some], at_risk[:, some], events[:, some]
    share = at_risk / n
    expected = (share * d).sum(1)
    factor = d * (n - d) / (n - 1)
    covariance = np.diag((share * factor).sum(1)) - (share * factor) @ share.T
    difference = (events.sum(1) - expected)[:-1]
    statistic = float(difference @ np.linalg.pinv(covariance[:-1, :-1]) @ difference)
    return statistic, len(groups) - 1, events.sum(1), expected


def km(method: Method) -> Plan:
    """Survival by group in time bins, with the log-rank test."""
    groups = yield from ask_survival(method)
    edges = next(iter(groups.values())).edges
    curves = {name: kaplan_meier(state) for name, state in groups.items()}
    rows: list[list[Value]] = []
    for name, state in groups.items():
        curve = curves[name]
        ends = zip((0.0, *edges), (*edges, None), strict=True)
        counts = zip(state.events, state.censored, strict=True)
        columns = zip(*(part.tolist() for part in curve[1:4]), strict=True)
        for end, count, n, values in zip(ends, counts, curve.at_risk, columns, strict=True):
            rows.append([name, *end, int(n), *count, *values])
    titles = ("from", "to", "at risk", "events", "censored", "survival", "2.5 %", "97.5 %")
    tables = [make_table((method.by or "group", *titles), rows)]
    tables.append(_summary(method.by or "group", groups, curves, edges))
    if len(groups) > 1:
        statistic, df, *_ = log_rank([*groups.values()])
        test = (statistic, df, chi2_p(statistic, df))
        tables.append(make_table(("log-rank chi2", "df", "p"), [test], "log-rank"))
    last = edges[-1] if edges else 0.0
    return Statistics(
        method=method.text,
        tables=tuple(tables),
        notes=(f"{len(edges) + 1} time bins with enough rows at each peer; the last is open.",),
        plot=tuple(
            draw_curves({name: curve.survival.tolist() for name, curve in curves.items()},
                        [*edges, last + (last - edges[-2] if len(edges) > 1 else last or 1.0)])
        ),
    )  # fmt: skip


def _summary(
    by: str, groups: dict[str, SurvivalState], curves: dict[str, Curve], edges: tuple[float, ...]
) -> ResultTable:
    """Rows, events and the bin with the median of each group."""
    rows: list[list[Value]] = []
    for name, state in groups.items():
        place = curves[name].median
        ends = (None, None) if place is None else ((0.0, *edges)[place], (*edges, None)[place])
        total = sum(state.events) + sum(state.censored)
        rows.append([name, total, sum(state.events), *ends])
    return make_table((by, "rows", "events", "median from", "median to"), rows, "summary")
