"""The coding of a model's terms, which all peers share, and its results. Pure.

The first questions give the kinds and categories of the columns, and then means and deviations, so
that sums of squares lose no digits. Coefficients are given for the columns as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from coordinator.jobs.analysis import Merged
from coordinator.jobs.methods.counts import ask_levels
from coordinator.jobs.methods.distributions import REACH_95, normal_p
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import ResultTable, Value, make_table, pick_states
from protocols.analytics.mergeable_states import MomentsState
from protocols.analytics.models import MAX_LEVELS, MAX_PARAMETERS, Model
from protocols.analytics.query import Operation, Query
from protocols.errors import CannotBeMet
from protocols.tables.statistics import Moments

Floats = npt.NDArray[np.floating]


class Coded(NamedTuple):
    """A model with the levels and scales of its terms, and the moments of columns of numbers."""

    model: Model
    moments: dict[str, Moments]


def code_terms(method: Method) -> Generator[Query, Merged, Coded]:
    """Ask for what the terms need. Raises CannotBeMet."""
    assert method.model is not None
    terms = method.model.terms
    kinds, levels = yield from ask_levels(method, method.columns)
    terms = tuple(
        replace(term, categories=True, levels=tuple(levels[term.column]))
        if term.categories or kinds.get(term.column) == "text"
        else term
        for term in terms
    )
    for term in terms:
        if term.categories and not 2 <= len(term.levels) <= MAX_LEVELS:
            raise CannotBeMet(
                f"{term.column!r} has {len(term.levels)} categories with enough rows",
                f"a term has 2 to {MAX_LEVELS}",
            )
    numbers = [n for n in method.columns if not any(t.column == n and t.categories for t in terms)]
    merged = yield method.query(*(Operation("mean", (name,)) for name in numbers))
    moments = {}
    for place, name in enumerate(numbers):
        state = pick_states(merged, place, MomentsState).get(())
        if state is None or not state.moments.m2:
            raise CannotBeMet(f"{name!r} has too few rows, or values that are all alike")
        moments[name] = state.moments
    terms = tuple(
        term
        if term.categories
        else replace(
            term,
            center=_short(moments[term.column].mean),
            scale=_short(math.sqrt(moments[term.column].variance)),
        )
        for term in terms
    )
    model = replace(method.model, terms=terms)
    if len(model.names) > MAX_PARAMETERS:
        raise CannotBeMet(f"the model has more than {MAX_PARAMETERS} coefficients")
    return Coded(model, moments)


def _short(value: float) -> float:
    """A number with few digits: the question is read by people."""
    return float(f"{value:.4g}")


def solve(information: Floats, score: Floats) -> Floats:
    """The step of Newton's method. Raises CannotBeMet."""
    try:
        if np.linalg.cond(information) < 1e13:
            return np.linalg.solve(information, score)
    except np.linalg.LinAlgError:
        pass
    raise CannotBeMet("some terms follow from others, or a category says all of the outcome")


def unscale(model: Model, at: Floats, covariance: Floats) -> tuple[Floats, Floats]:
    """The coefficients and their covariance for the columns as they are, not scaled."""
    back: Floats = np.zeros((len(at), len(at)))
    first = int(model.family is not None)
    back[:first, :first] = 1
    places: dict[tuple[int, ...], int] = {}
    for block in model.blocks:
        places[block], sizes = first, [len(model.terms[one].names) for one in block]
        for number, part in enumerate(itertools.product(*map(range, sizes))):
            # The product of (x - center) / scale, multiplied out: a part of it is that of fewer
            # terms, which are in the model, too.
            scale = math.prod(model.terms[one].scale for one in block)
            for kept in itertools.product((True, False), repeat=len(block)):
                some = tuple(one for one, keep in zip(block, kept, strict=True) if keep)
                lost = [one for one, keep in zip(block, kept, strict=True) if not keep]
                factor = math.prod(-model.terms[one].center for one in lost) / scale
                if some:
                    which = [place for place, keep in zip(part, kept, strict=True) if keep]
                    widths = [len(model.terms[one].names) for one in some]
                    row = places[some] + int(np.ravel_multi_index(which, widths))
                elif model.family:
                    row = 0
                else:
                    continue  # a Cox model has no intercept
                back[row, first + number] += factor
        first += math.prod(sizes)
    return back @ at, back @ covariance @ back.T


def coefficient_table(
    model: Model, at: Floats, covariance: Floats, exponential: str = ""
) -> ResultTable:
    """Coefficients with standard errors, z, p and 95 % intervals; also exp(coef) if it is named."""
    at, covariance = unscale(model, at, covariance)
    rows: list[list[Value]] = []
    for name, value, variance in zip(model.names, at, covariance.diagonal(), strict=True):
        error = math.sqrt(variance)
        ends = (value - REACH_95 * error, value + REACH_95 * error)
        row: list[Value] = [name, value, error, value / error, normal_p(value / error), *ends]
        if exponential:
            row.append(math.exp(value) if abs(value) < 700 else None)
        rows.append(row)
    columns = ("term", "coef", "SE", "z", "p", "2.5 %", "97.5 %")
    return make_table((*columns, exponential) if exponential else columns, rows)


def reference_notes(model: Model) -> list[str]:
    """A line for each term of categories: which one has no coefficient."""
    return [
        f"{term.column}: compared with {term.levels[0]}." for term in model.terms if term.categories
    ]
