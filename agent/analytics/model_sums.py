"""Sums for the iterations of regression models, and what this peer refuses to sum. Pure.

A model is refused with too few rows for its coefficients, for a combination of categories that few
rows have, and for coefficients that make a few rows outweigh the others. Each question with other
coefficients is more equations about the same values; there are fewer than rows. A refused question
counts too, because a refusal says something about the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from msgspec import UNSET

from agent.analytics.compute import Mask, Places, Table
from agent.analytics.figures import (
    MAX_SOLVABLE_VALUES,
    PRODUCTS,
    Figure,
    ToldRows,
    is_dominated,
    leave_out,
    min_product_rows,
)
from protocols.analytics.mergeable_states import Floats
from protocols.analytics.model_states import FitState, RiskState, to_upper
from protocols.analytics.models import Model, Term
from protocols.analytics.query import Operation
from protocols.errors import Refused

#: Adds a number of equations to the count of each of these columns. Returns the equations of the
#: past about any of them.
Spend = Callable[[Sequence[str], int], int]


#: Larger sums are not decoded.
_MAX_SUM = 1e300
#: The effective number of rows is at least this part of them.
_MAX_CONCENTRATION = 20

_TOO_FEW = Refused(
    "this model has too many coefficients or bins for the rows here, or its columns were in too "
    "many models",
    "leave terms out, or ask the question of before",
)
_FEW = Refused("the coefficients of this question give a few rows most of the weight")
_OUTSIDE = Refused("the coefficients of this question have no value for some rows")


class _Used(NamedTuple):
    """The rows of a model: its outcome, float64[n] each; its terms, float64[n, p]; the columns with
    few values, as codes, int64[n]; and the sizes of the other columns, float64[n] each, not scaled:
    whoever asks chooses the scales."""

    rows: Places
    outcome: list[Floats]
    terms: Floats
    sizes: list[Floats]
    categories: dict[str, Places]


def compute_model(
    operation: Operation, table: Table, rows: Places, min_rows: int, spend: Spend
) -> Figure:
    """The sums of `glm` or `cox` over the rows at these places. Raises Refused."""
    model = operation.model
    assert model is not UNSET
    width, bins = len(model.at), len(model.edges) + 1
    equations = width + 2 if model.family else 2 * bins * (width + 1)
    used = _find_rows(operation, model, table, rows, min_rows)
    if len(used.rows) < min_product_rows(table, min_rows) + equations:
        raise _TOO_FEW
    _check_columns(operation, model, table, used, min_rows)
    parts = [] if model.family else _find_parts(operation, model, used, min_rows)
    past = spend(operation.columns, equations)
    if len(used.rows) < min_product_rows(table, min_rows) + past + equations:
        raise _TOO_FEW
    told = [ToldRows(name, used.rows) for name in operation.columns if name not in used.categories]
    told += [
        ToldRows("", used.rows[codes == code])
        for codes in used.categories.values()
        for code in np.unique(codes)
    ]
    told.append(ToldRows(PRODUCTS, used.rows))
    told += [ToldRows("", used.rows[part]) for part in parts if len(part)]
    with np.errstate(all="ignore"):
        state: FitState | RiskState = (
            _sum_fit(model, used, min_rows)
            if model.family
            else _sum_risks(model, used, parts, min_rows)
        )
    if not (np.abs(_numbers_of(state)) <= _MAX_SUM).all():
        raise _OUTSIDE
    return Figure(state, tuple(told))


def _numbers_of(state: FitState | RiskState) -> Floats:
    if isinstance(state, RiskState):
        return np.array([*state.covariates, *state.sums])
    return np.array([*state.score, *state.information, state.deviance, state.pearson, state.base])


# --- rows and columns ------------------------------------------------------------------------


def _find_rows(
    operation: Operation, model: Model, table: Table, rows: Places, min_rows: int
) -> _Used:
    """The rows that have all values. A value that the outcome cannot have counts as missing, and so
    does a category that few of these rows have."""
    outcomes = operation.columns[: len(operation.columns) - len(model.terms)]
    codes = {term.column: _codes(term, table) for term in model.terms if term.categories}
    gone = np.zeros(table.rows, bool)
    for name in operation.columns:
        gone |= codes[name] < 0 if name in codes else np.isnan(table.numbers(name))
    gone |= ~_is_possible(model, [table.numbers(name) for name in outcomes])
    some_gone, here = bool(gone.any()), gone[rows]
    while True:
        before = here.sum()
        for code in codes.values():
            counts = np.bincount(code[rows][~here], minlength=1)
            rare = np.flatnonzero((counts > 0) & (counts < min_rows))
            here |= np.isin(code[rows], rare)
        if here.sum() == before:
            break
    used = leave_out(rows, here, some_gone or bool(before), min_rows)
    few = [name for name in operation.columns if name not in codes and _has_few(table, name)]
    return _Used(
        used,
        [table.numbers(name)[used] for name in outcomes],
        _design(model, table, codes, used),
        [
            np.abs(table.numbers(term.column)[used])
            for term in model.terms
            if term.column not in {*codes, *few}
        ],
        {name: code[used] for name, code in codes.items()}
        | {name: np.unique(table.numbers(name)[used], return_inverse=True)[1] for name in few},
    )


def _codes(term: Term, table: Table) -> Places:
    """The place of each row's category in the levels, int64[rows]; -1 for another one."""
    column, levels = table.columns[term.column], {name: i for i, name in enumerate(term.levels)}
    return np.array([*(levels.get(word, -1) for word in column.words), -1], np.int64)[column.codes]


def _has_few(table: Table, name: str) -> bool:
    return table.num_values(name) <= MAX_SOLVABLE_VALUES


def _is_possible(model: Model, outcomes: list[Floats]) -> Mask:
    """The rows with an outcome that the model allows."""
    first = outcomes[0]
    possible: Mask = ~np.isnan(first)
    match model.family:
        case None:
            possible = (first >= 0) & ((outcomes[1] == 0) | (outcomes[1] == 1))
        case "binomial":
            possible = (first == 0) | (first == 1)
        case "poisson":
            possible = (first >= 0) & (first == np.floor(first))
        case "gamma":
            possible = first > 0
    return possible


def _design(model: Model, table: Table, codes: dict[str, Places], used: Places) -> Floats:
    """The matrix of the model, float64[n, p]."""
    columns = [np.ones(len(used))] if model.family else []
    for term in model.terms:
        if term.categories:
            code = codes[term.column][used]
            columns += [(code == i).astype(np.float64) for i in range(1, len(term.levels))]
        else:
            columns.append((table.numbers(term.column)[used] - term.center) / term.scale)
    return np.stack(columns, 1)


def _check_columns(
    operation: Operation, model: Model, table: Table, used: _Used, min_rows: int
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
    for (a, first), (b, second) in itertools.combinations(used.categories.items(), 2):
        width = int(second.max()) + 1
        table_of = np.bincount(first * width + second, minlength=(int(first.max()) + 1) * width)
        pairs = table_of.reshape(-1, width)
        if pairs[pairs.sum(1) > 0][:, pairs.sum(0) > 0].min() < min_rows:
            raise Refused(f"too few rows here have some combination of {a!r} and {b!r}")


def _check_spread(weights: Floats, min_rows: int) -> None:
    """Raise Refused if few rows have most of the weight, by Kish's effective number of rows.

    Many rows need many: else a curve could be so steep that a sum counts rows above a threshold.
    """
    total, squares = weights.sum(), (weights * weights).sum()
    if not np.isfinite(total) or not np.isfinite(squares):
        raise _OUTSIDE
    if total * total < max(min_rows, len(weights) / _MAX_CONCENTRATION) * squares:
        raise _FEW


# --- sums ------------------------------------------------------------------------------------


def _sum_fit(model: Model, used: _Used, min_rows: int) -> FitState:
    """One step of Fisher scoring (McCullagh and Nelder, Generalized Linear Models, 1989, 2.5)."""
    y, x = used.outcome[0], used.terms
    eta = x @ np.array(model.at)
    mean, slope = _mean(model, eta)
    variance = _variance(model, mean)
    if not (np.isfinite(mean).all() and (variance > 0).all() and np.isfinite(slope).all()):
        raise _OUTSIDE
    weights, residuals = slope * slope / variance, (y - mean) * slope / variance
    deviances = _deviances(model, y, mean, eta)
    # How much each outcome counts in the score; the other part of a residual has no secret.
    counted = np.abs(slope / variance)
    for part in (weights, counted):
        _check_spread(part, min_rows)
    heavy = [deviances, weights, counted * y]
    heavy += [part * size for part in (weights, counted * y) for size in used.sizes]
    if any(map(is_dominated, heavy)):
        raise _FEW
    base = 0.0
    if model.family == "poisson":
        base = float(_x_log_y(y, y).sum() - y.sum()) - sum(math.lgamma(v + 1) for v in y.tolist())
    elif model.family == "gamma":
        base = float(np.log(y).sum())
    return FitState(
        rows=len(y),
        score=tuple((x.T @ residuals).tolist()),
        information=to_upper((x.T * weights) @ x),
        deviance=float(deviances.sum()),
        pearson=float(((y - mean) ** 2 / variance).sum()),
        base=base,
    )


def _mean(model: Model, eta: Floats) -> tuple[Floats, Floats]:
    """The mean of the outcome, and its derivative by the linear predictor."""
    match model.link:
        case "logit":
            mean = 1 / (1 + np.exp(-eta))
            return mean, mean * (1 - mean)
        case "log":
            mean = np.exp(eta)
            return mean, mean
        case "inverse":
            if (eta <= 0).any():
                raise _OUTSIDE
            return 1 / eta, -1 / (eta * eta)
        case _:
            return eta, np.ones(len(eta))


def _variance(model: Model, mean: Floats) -> Floats:
    match model.family:
        case "binomial":
            return mean * (1 - mean)
        case "poisson":
            return mean
        case "gamma":
            return mean * mean
        case _:
            return np.ones(len(mean))


def _deviances(model: Model, y: Floats, mean: Floats, eta: Floats) -> Floats:
    match model.family:
        case "binomial":
            return 2 * (np.logaddexp(0, eta) - y * eta)
        case "poisson":
            return 2 * (_x_log_y(y, y / mean) - (y - mean))
        case "gamma":
            return 2 * ((y - mean) / mean - np.log(y / mean))
        case _:
            return (y - mean) ** 2


def _x_log_y(x: Floats, y: Floats) -> Floats:
    return np.where(x > 0, x * np.log(np.where(x > 0, y, 1.0)), 0.0)


def _find_parts(operation: Operation, model: Model, used: _Used, min_rows: int) -> list[Places]:
    """The places of the rows with the event and of those without, for each time bin.

    Raises Refused if a part has few rows for the coefficients, or few of a category.
    """
    time, event = used.outcome
    bin_of = np.searchsorted(model.edges, time, side="right")
    parts = []
    for place, happened in itertools.product(range(len(model.edges) + 1), (1, 0)):
        part = np.flatnonzero((bin_of == place) & (event == happened))
        sizes = [np.bincount(codes[part]) for codes in used.categories.values()]
        if 0 < len(part) < min_rows + len(model.at) or any(
            ((counts > 0) & (counts < min_rows)).any() for counts in sizes
        ):
            raise Refused(
                "too few rows here of some category have, or do not have, "
                f"{operation.columns[1]!r} in some time bin"
            )
        parts.append(part)
    return parts


def _sum_risks(model: Model, used: _Used, parts: list[Places], min_rows: int) -> RiskState:
    """The sums of a Cox model over each part."""
    event, x = used.outcome[1], used.terms
    weights = np.exp(x @ np.array(model.at))
    sums: list[float] = []
    for part in parts:
        w, inside = weights[part], x[part]
        if len(part):
            _check_spread(w, min_rows)
            if any(is_dominated(w * size[part]) for size in used.sizes):
                raise _FEW
        sums += [float(w.sum()), *(w @ inside).tolist(), *to_upper((inside.T * w) @ inside)]
    counts = [len(part) for part in parts]
    return RiskState(
        events=tuple(counts[::2]),
        censored=tuple(counts[1::2]),
        covariates=tuple(x[event == 1].sum(0).tolist()),
        sums=tuple(sums),
    )
