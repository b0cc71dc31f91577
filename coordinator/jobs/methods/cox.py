"""Cox's proportional hazards over the peers' sums by time bin, with Efron's ties. Pure.

Efron, The efficiency of Cox's likelihood function for censored data, 1977. As `lifelines` with the
number of the bin as the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from coordinator.jobs.analysis import Merged
from coordinator.jobs.methods.coding import (
    Floats,
    code_terms,
    coefficient_table,
    reference_notes,
    solve,
)
from coordinator.jobs.methods.distributions import chi2_p
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import (
    PeersLost,
    Plan,
    Statistics,
    make_table,
    pick_states,
)
from coordinator.jobs.methods.survival import FEWER, last_time
from protocols.analytics.model_states import RiskState, SurvivalState, from_upper, upper_size
from protocols.analytics.models import Model
from protocols.analytics.query import Operation, Query
from protocols.errors import CannotBeMet

MAX_STEPS = 20
#: A peer answers fewer sums about a column than it has rows, in all steps together.
_MAX_BINS, _USUAL_STEPS = 32, 5
#: Of each combination of categories in each bin: fewer would often be too few at some peer.
_USUAL_ROWS = 12
#: A step this small, in standard errors, is the last.
_SMALL = 1e-9


class Likelihood(NamedTuple):
    """The partial log-likelihood, its gradient, float64[p], and the information, float64[p, p]."""

    value: float
    score: Floats
    information: Floats


def efron(state: RiskState, at: Floats) -> Likelihood:
    """The partial likelihood with the times in one bin as ties."""
    width, bins = len(at), len(state.events)
    sums = np.array(state.sums).reshape(bins, 2, 1 + width + upper_size(width))
    # A person in a later bin is at risk too.
    at_risk = sums.sum(1)[::-1].cumsum(0)[::-1]
    value = float(np.array(state.covariates) @ at)
    score: Floats = np.array(state.covariates)
    information: Floats = np.zeros((width, width))
    for events, risk, tied in zip(state.events, at_risk, sums[:, 0], strict=True):
        shares = np.arange(events)[:, None] / max(events, 1)
        parts = risk - shares * tied
        weight, first = parts[:, 0], parts[:, 1 : 1 + width]
        second = from_upper(parts[:, 1 + width :], width)
        mean = first / weight[:, None]
        value -= float(np.log(weight).sum())
        score = score - mean.sum(0)
        information = information + (second / weight[:, None, None]).sum(0) - mean.T @ mean
    return Likelihood(value, score, information)


def cox(method: Method) -> Plan:
    """A Cox model in time bins."""
    model, moments = yield from code_terms(method)
    time, event = method.columns[:2]
    counts = Operation("survival", (time, event), (last_time(moments[time]),))
    merged = yield method.query(counts)
    found = pick_states(merged, 0, SurvivalState).get(())
    if found is None or len(found.edges) < 1:
        raise CannotBeMet("there are fewer than two time bins with enough rows at each peer", FEWER)
    width = len(model.names)
    rows = merged.least_rows
    enough = _USUAL_ROWS * combinations(model) * merged.rows / max(rows, 1)
    possible = len(_edges_with(found, math.ceil(enough))) + 1
    bins = min(_MAX_BINS, possible, rows // (2 * (model.sums_about_one + 1) * _USUAL_STEPS))
    while True:
        try:
            model = replace(model, edges=choose_edges(found, bins))
            state = yield from _ask(method, model, np.zeros(width))
            break
        except PeersLost:
            if bins <= 2:
                raise
            bins -= max(1, bins // 4)  # a peer has too few rows for this number of bins
    edges = model.edges
    null = efron(state, np.zeros(width))
    at, now, steps = yield from _iterate(method, model, null)
    covariance = np.linalg.inv(now.information)
    ratio = 2 * (now.value - null.value)
    total = sum(state.events) + sum(state.censored)
    fit = (total, sum(state.events), len(edges) + 1, now.value, ratio, width, chi2_p(ratio, width))
    columns = ("rows", "events", "time bins", "log-likelihood", "likelihood ratio", "df", "p")
    return Statistics(
        method=method.text,
        tables=(
            coefficient_table(model, at, covariance, "hazard ratio"),
            make_table(columns, [fit], "fit"),
            make_table(
                ("from", "to", "events", "censored"),
                zip((0.0, *edges), (*edges, None), state.events, state.censored, strict=True),
                "time bins",
            ),
        ),
        notes=(
            f"{steps} steps. Times in one bin are ties (Efron).",
            *reference_notes(model),
        ),
    )


def combinations(model: Model) -> int:
    """The most combinations of categories for which sums of a model are released."""
    sizes = [max(len(term.levels), 1) for term in model.terms]
    return max(
        math.prod(sizes[place] for place in {*one, *other})
        for one, other in itertools.combinations_with_replacement(model.blocks, 2)
    )


def choose_edges(state: SurvivalState, bins: int) -> tuple[float, ...]:
    """Edges of this number of bins, 2 or more, with many rows both with and without the event.

    Of all ways that give this number, the one whose smallest count in a bin is greatest. A bin
    without any row with the event, or without it, is fine.
    """
    counts = np.stack([state.events, state.censored])
    most, least = int(counts.sum(1).max()), 1
    found: tuple[float, ...] = ()
    while least <= most:
        wanted = (least + most) // 2
        edges = _edges_with(state, wanted)
        if len(edges) + 1 >= max(bins, 2):
            found, least = edges, wanted + 1
        else:
            most = wanted - 1
    return found[: max(bins, 2) - 1] or state.edges[:1]


def _edges_with(state: SurvivalState, least: int) -> tuple[float, ...]:
    """The edges of the bins that are full first, with 0 or `least` rows of both kinds."""
    edges: list[float] = []
    left = np.array([sum(state.events), sum(state.censored)])
    inside = np.zeros(2, np.int64)
    for edge, *count in zip(state.edges, state.events, state.censored, strict=False):
        inside, left = inside + count, left - count
        if all(((part == 0) | (part >= least)).all() and part.any() for part in (inside, left)):
            edges.append(edge)
            inside = np.zeros(2, np.int64)
    return tuple(edges)


def _ask(method: Method, model: Model, at: Floats) -> Generator[Query, Merged, RiskState]:
    asked = replace(model, at=tuple(at.tolist()))
    merged = yield method.query(Operation("cox", method.columns, model=asked))
    state = pick_states(merged, 0, RiskState).get(())
    if state is None:
        raise CannotBeMet("no peer has enough rows for this model")
    return state


def _iterate(
    method: Method, model: Model, start: Likelihood
) -> Generator[Query, Merged, tuple[Floats, Likelihood, int]]:
    """Newton's method, with half a step where the likelihood falls."""
    at: Floats = np.zeros(len(start.score))
    before, now = -math.inf, start
    step: Floats = np.zeros(len(at))
    for number in range(1, MAX_STEPS + 1):
        if now.value < before - 1e-9 * abs(before):
            step = step / 2
            at = at - step
        else:
            step = solve(now.information, now.score)
            error = 1 / np.sqrt(now.information.diagonal())
            if (np.abs(step) <= _SMALL * error).all():
                return at + step, now, number
            before, at = now.value, at + step
        state = yield from _ask(method, model, at)
        now = efron(state, at)
    raise CannotBeMet(
        f"the coefficients do not settle in {MAX_STEPS} steps",
        "a category may say all of the outcome: leave a term out",
    )
