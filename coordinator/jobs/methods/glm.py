"""Generalized linear models by Fisher scoring over the peers' sums. Pure.

As `statsmodels.GLM`: normal tests, dispersion by Pearson's statistic (1 for binomial and Poisson).
"""

from __future__ import annotations

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
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import (
    PeersLost,
    Plan,
    Statistics,
    make_table,
    pick_states,
)
from protocols.analytics.model_states import FitState, from_upper
from protocols.analytics.models import LINKS, Model
from protocols.analytics.query import Operation, Query
from protocols.errors import CannotBeMet

#: Steps of one model, and halvings of a step that leads nowhere.
MAX_STEPS, _MAX_HALVINGS = 25, 5
#: A step this small, beside the standard errors or the digits of the coefficients, is the last.
_SMALL, _ROUNDING = 1e-9, 1e-14
_LEAST_DEVIANCE = 1e-9


class Fit(NamedTuple):
    """The coefficients, the sums at them or one negligible step before, and the first sums."""

    at: Floats
    state: FitState
    steps: int
    first: FitState


def glm(method: Method) -> Plan:
    """A generalized linear model with an intercept."""
    model, moments = yield from code_terms(method)
    assert model.family is not None
    model = replace(model, link=model.link or LINKS[model.family][0])
    start = np.zeros(len(model.names))
    start[0] = _link(model, moments[method.columns[0]].mean)
    at, state, steps, first = yield from _iterate(method, model, start)
    df = state.rows - len(at)
    if df < 1:
        raise CannotBeMet("there are as many coefficients as rows")
    scale = 1.0 if model.family in ("binomial", "poisson") else state.pearson / df
    information = from_upper(state.information, len(at))
    covariance = scale * np.linalg.inv(information)
    likelihood = log_likelihood(model, state, scale)
    ratio = {"logit": "odds ratio", "log": "exp(coef)"}.get(model.link or "", "")
    fit = (state.rows, df, state.deviance, state.pearson, scale, likelihood)
    null = null_deviance(model, first, float(start[0]))
    squares = pseudo_r2(model, replace(state, deviance=null), state, scale)
    return Statistics(
        method=method.text,
        tables=(
            coefficient_table(model, at, covariance, ratio),
            make_table(
                (
                    *("rows", "df", "deviance", "Pearson chi2", "scale", "log-likelihood", "AIC"),
                    *("null deviance", "R²" if model.link == "identity" else "pseudo R²"),
                ),
                [(*fit, 2 * len(at) - 2 * likelihood, null, squares)],
                "fit",
            ),
        ),
        notes=(f"{model.family}, link {model.link}, {steps} steps.", *reference_notes(model)),
    )


def _iterate(method: Method, model: Model, start: Floats) -> Generator[Query, Merged, Fit]:
    at, before, halvings = start, math.inf, 0
    first: FitState | None = None
    step: Floats = np.zeros(len(start))
    for number in range(1, MAX_STEPS + 1):
        asked = replace(model, at=tuple((at + step).tolist()))
        try:
            merged = yield method.query(Operation("glm", method.columns, model=asked))
        except PeersLost:  # some coefficients have no value for some rows
            if number == 1 or halvings >= _MAX_HALVINGS:
                raise
            step, halvings = step / 2, halvings + 1
            continue
        state = pick_states(merged, 0, FitState).get(())
        if state is None:
            raise CannotBeMet("no peer has enough rows for this model")
        first = first or state
        if state.deviance > before * (1 + 1e-6) + _LEAST_DEVIANCE and halvings < _MAX_HALVINGS:
            step, halvings = step / 2, halvings + 1
            continue
        at, before, halvings = at + step, state.deviance, 0
        information = from_upper(state.information, len(at))
        step = solve(information, np.array(state.score))
        error = np.sqrt(state.pearson / state.rows / information.diagonal())
        if (np.abs(step) <= _SMALL * error + _ROUNDING * np.abs(at)).all():
            return Fit(at + step, state, number, first)
    raise CannotBeMet(
        f"the coefficients do not settle in {MAX_STEPS} steps",
        "a category may say all of the outcome: leave a term out",
    )


def _link(model: Model, mean: float) -> float:
    """The linear predictor of a mean. Raises CannotBeMet."""
    try:
        match model.link:
            case "logit":
                return math.log(mean / (1 - mean))
            case "log":
                return math.log(mean)
            case "inverse":
                return 1 / mean
            case _:
                return mean
    except (ValueError, ZeroDivisionError) as err:
        raise CannotBeMet(
            f"the outcome has a mean of {mean:g}, which {model.family} does not allow",
            "binomial: 0 and 1; Poisson: 0, 1, 2 and so on; gamma: above 0",
        ) from err


def log_likelihood(model: Model, state: FitState, scale: float) -> float:
    """The log-likelihood at the sums of `state`."""
    n = state.rows
    match model.family:
        case "binomial":
            return -state.deviance / 2
        case "poisson":
            return state.base - state.deviance / 2
        case "gamma":
            k = 1 / scale
            return (
                -k * (state.deviance / 2 + n) + n * (k * math.log(k) - math.lgamma(k)) - state.base
            )
        case _ if model.link == "identity":
            return -n / 2 * (math.log(2 * math.pi * state.deviance / n) + 1)
        case _:
            return -(n * math.log(2 * math.pi * scale) + state.deviance / scale) / 2


def null_deviance(model: Model, first: FitState, intercept: float) -> float:
    """The deviance of a model with an intercept alone, from the sums at `intercept` alone.

    Its mean is that of the outcomes, whatever family and link are.
    """
    n, mean = first.rows, _mean(model, intercept)
    # The score of the intercept has the factor (dmean/deta) / variance.
    slope = {"logit": mean * (1 - mean), "log": mean, "inverse": -mean * mean}
    variance = {"binomial": mean * (1 - mean), "poisson": mean, "gamma": mean * mean}
    factor = slope.get(model.link or "", 1.0) / variance.get(model.family or "", 1.0)
    found = mean + first.score[0] / (n * factor)
    match model.family:
        case "binomial":
            return -2 * n * (found * math.log(found) + (1 - found) * math.log(1 - found))
        case "poisson":
            change = found * math.log(mean / found) + found - mean
        case "gamma":
            change = 1 - found / mean + math.log(found / mean)
        case _:
            change = -((found - mean) ** 2) / 2
    return first.deviance + 2 * n * change


def _mean(model: Model, intercept: float) -> float:
    match model.link:
        case "logit":
            return 1 / (1 + math.exp(-intercept))
        case "log":
            return math.exp(intercept)
        case "inverse":
            return 1 / intercept
    return intercept


def pseudo_r2(model: Model, null: FitState, state: FitState, scale: float) -> float | None:
    """R² of a linear model; else McFadden's, 1 - log-likelihood / that of the intercept alone.

    None for the families where it is not usual.
    """
    if model.link == "identity":
        return 1 - state.deviance / null.deviance
    if model.family not in ("binomial", "poisson"):
        return None
    return 1 - log_likelihood(model, state, scale) / log_likelihood(model, null, scale)
