"""Sums for the iterations of regression models, and what this peer refuses to sum. Pure.

A model is refused if it has too few rows for its coefficients, if few rows have a combination of
categories, or if the coefficients make a few rows outweigh the others. Each question with other
coefficients adds equations about the same values; there must be fewer equations than rows. A
refused question counts too, because a refusal says something about the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

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
from agent.analytics.model_rules import (
    FEW,
    OUTSIDE,
    Used,
    check_columns,
    check_spread,
    cross,
    crossings,
    find_parts,
    groups_of,
)
from protocols.analytics.mergeable_states import Floats
from protocols.analytics.model_states import FitState, RiskState, to_upper
from protocols.analytics.models import Model, Term
from protocols.analytics.query import Operation
from protocols.analytics.row_sets import TIME, ones, part_of
from protocols.errors import Refused

#: Adds a number of equations to the count of each of these columns. Returns the equations of the
#: past about any of them.
Spend = Callable[[Sequence[str], int], int]


#: Larger sums are not decoded.
_MAX_SUM = 1e300

_TOO_FEW = Refused(
    "this model has too many coefficients or bins for the rows here, or its columns were in too "
    "many models",
    "leave out terms, or repeat an earlier question",
)


def compute_model(
    operation: Operation, table: Table, rows: Places, min_rows: int, spend: Spend
) -> Figure:
    """The sums of `glm` or `cox` over the rows at these places. Raises Refused."""
    model = operation.model
    assert model is not UNSET
    bins, about_one = len(model.edges) + 1, model.sums_about_one
    equations = about_one + 2 if model.family else 2 * bins * (about_one + 1)
    used = _find_rows(operation, model, table, rows, min_rows)
    if len(used.rows) < min_product_rows(table, min_rows) + equations:
        raise _TOO_FEW
    check_columns(operation, model, table, used, min_rows)
    parts = [] if model.family else find_parts(operation, model, used, min_rows)
    past = spend(operation.columns, equations)
    if len(used.rows) < min_product_rows(table, min_rows) + past + equations:
        raise _TOO_FEW
    told = [ToldRows(name, used.rows) for name in operation.columns if name not in used.categories]
    told += [
        ToldRows("", used.rows[codes == code])
        for codes in used.categories.values()
        for code in np.unique(codes)
    ]
    told += [
        ToldRows("", used.rows[codes == code])
        for columns in crossings(operation, model, used.categories)
        for codes in [cross([used.categories[name] for name in columns])]
        for code in np.unique(codes)
    ]
    told.append(ToldRows(PRODUCTS, used.rows))
    told += [ToldRows("", used.rows[part]) for part in parts if len(part)]
    with np.errstate(all="ignore"):
        state: FitState | RiskState = (
            _sum_fit(model, used, min_rows)
            if model.family
            else _sum_risks(model, used, parts, groups_of(operation, model, used), min_rows)
        )
    if not (np.abs(_numbers_of(state)) <= _MAX_SUM).all():
        raise OUTSIDE
    return Figure(state, tuple(told), _rows_of_parts(operation, model, table, used.rows, parts))


def _rows_of_parts(
    operation: Operation, model: Model, table: Table, used: Places, parts: Sequence[Places]
) -> dict[str, Places]:
    """The rows that the numbers of a model are sums over: all, those of each category, and those of
    each part by time. A column of zeros and ones is a category, too."""
    over = {"": used}
    for place, name in enumerate(operation.columns):
        values = table.columns[name].values
        if values is not None and np.isin(values[used], (0, 1)).all():
            over[ones(place)] = used[values[used] == 1]
    codes_of = {term.column: _codes(term, table)[used] for term in model.terms if term.categories}
    places = {term.column: place for place, term in enumerate(model.terms)}
    together: list[tuple[str, ...]] = [(name,) for name in codes_of]
    if model.products:
        together += crossings(operation, model, codes_of)
    for names in together:
        of, codes = "&".join(str(places[name]) for name in names), np.zeros(len(used), np.int64)
        for name in names:
            codes = codes * len(model.terms[places[name]].levels) + codes_of[name]
        over |= {part_of(of, code): used[codes == code] for code in np.unique(codes).tolist()}
    return over | {part_of(TIME, number): used[rows] for number, rows in enumerate(parts)}


def _numbers_of(state: FitState | RiskState) -> Floats:
    if isinstance(state, RiskState):
        return np.array([*state.covariates, *state.sums])
    return np.array([*state.score, *state.information, state.deviance, state.pearson, state.base])


# --- rows and columns ------------------------------------------------------------------------


def _find_rows(
    operation: Operation, model: Model, table: Table, rows: Places, min_rows: int
) -> Used:
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
    return Used(
        used,
        [table.numbers(name)[used] for name in outcomes],
        _design(model, table, codes, used),
        [
            np.abs(np.prod([table.numbers(name)[used] for name in names], axis=0))
            for names in (tuple(model.terms[place].column for place in b) for b in model.blocks)
            if not {*codes, *few}.intersection(names)
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
    terms = []
    for term in model.terms:
        if term.categories:
            code = codes[term.column][used]
            terms.append((code[:, None] == np.arange(1, len(term.levels))).astype(np.float64))
        else:
            terms.append(((table.numbers(term.column)[used] - term.center) / term.scale)[:, None])
    products = [
        (terms[i][:, :, None] * terms[j][:, None, :]).reshape(len(used), -1)
        for i, j in model.products
    ]
    return np.concatenate(
        [np.ones((len(used), int(model.family is not None))), *terms, *products], 1
    )


# --- sums ------------------------------------------------------------------------------------


def _sum_fit(model: Model, used: Used, min_rows: int) -> FitState:
    """One step of Fisher scoring (McCullagh and Nelder, Generalized Linear Models, 1989, 2.5)."""
    y, x = used.outcome[0], used.terms
    eta = x @ np.array(model.at)
    mean, slope = _mean(model, eta)
    variance = _variance(model, mean)
    if not (np.isfinite(mean).all() and (variance > 0).all() and np.isfinite(slope).all()):
        raise OUTSIDE
    weights, residuals = slope * slope / variance, (y - mean) * slope / variance
    deviances = _deviances(model, y, mean, eta)
    # How much each outcome counts in the score; the other part of a residual has no secret.
    counted = np.abs(slope / variance)
    for part in (weights, counted):
        check_spread(part, min_rows)
    heavy = [deviances, weights, counted * y]
    heavy += [part * size for part in (weights, counted * y) for size in used.sizes]
    if any(map(is_dominated, heavy)):
        raise FEW
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
                raise OUTSIDE
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


def _sum_risks(
    model: Model, used: Used, parts: list[Places], groups: list[Places], min_rows: int
) -> RiskState:
    """The sums of a Cox model over each part."""
    event, x = used.outcome[1], used.terms
    weights = np.exp(x @ np.array(model.at))
    sums: list[float] = []
    for part in parts:
        w, inside = weights[part], x[part]
        if len(part):
            check_spread(w, min_rows)
            inside_of = [np.zeros(len(part), np.int64), *(codes[part] for codes in groups)]
            for heavy, codes in itertools.product(
                [w * size[part] for size in used.sizes], inside_of
            ):
                if any(is_dominated(heavy[codes == code]) for code in np.unique(codes)):
                    raise FEW
        sums += [float(w.sum()), *(w @ inside).tolist(), *to_upper((inside.T * w) @ inside)]
    counts = [len(part) for part in parts]
    return RiskState(
        events=tuple(counts[::2]),
        censored=tuple(counts[1::2]),
        covariates=tuple(x[event == 1].sum(0).tolist()),
        sums=tuple(sums),
    )
