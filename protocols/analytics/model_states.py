"""Mergeable statistics of models: categories, survival times and sums of an iteration. Pure."""

from __future__ import annotations

from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from protocols.analytics.models import MAX_EDGES, MAX_PARAMETERS
from protocols.messages.envelope import Count, Name, Text
from protocols.tables.statistics import MAX_COLUMNS, Finite

#: The most categories of a column in an answer.
MAX_TOLD_LEVELS = 64
_MAX_UPPER = MAX_PARAMETERS * (MAX_PARAMETERS + 1) // 2
_Vector = Annotated[tuple[Finite, ...], Meta(max_length=MAX_PARAMETERS)]
_Counts = Annotated[tuple[Count, ...], Meta(max_length=MAX_EDGES + 1)]
_T = TypeVar("_T", int, float)
_Floats = npt.NDArray[np.float64]


class ColumnsState(Struct, frozen=True, tag="columns"):
    """The columns that the owner allows in questions."""

    names: Annotated[tuple[Name, ...], Meta(max_length=MAX_COLUMNS)] = ()


class LevelsState(Struct, frozen=True, tag="levels"):
    """The categories of a column, with their rows."""

    counts: Annotated[dict[Text, Count], Meta(max_length=MAX_TOLD_LEVELS)] = {}


class SurvivalState(Struct, frozen=True, tag="survival"):
    """Rows with and without the event, by time bin. Bin i begins at edge i - 1."""

    edges: Annotated[tuple[Finite, ...], Meta(max_length=MAX_EDGES)] = ()
    events: _Counts = (0,)
    censored: _Counts = (0,)


class FitState(Struct, frozen=True, tag="fit"):
    """Sums for an iteration of a generalized linear model with p coefficients.

    `score`: X'r, float64[p]. `information`: the upper triangle of X'WX, row by row. `base`: what
    the log-likelihood needs of the outcomes alone.
    """

    rows: Count
    score: _Vector
    information: Annotated[tuple[Finite, ...], Meta(max_length=_MAX_UPPER)]
    deviance: Finite
    pearson: Finite
    base: Finite


class RiskState(Struct, frozen=True, tag="risk"):
    """Sums for an iteration of a Cox model with p coefficients.

    `covariates`: the sum of x over the rows with the event. `sums`: for each time bin, of the rows
    with the event and then of the others, the sums of w, wx and the upper triangle of wxx', where
    w = exp(x'b).
    """

    events: _Counts
    censored: _Counts
    covariates: _Vector
    sums: Annotated[tuple[Finite, ...], Meta(max_length=2 * (MAX_EDGES + 1) * (1 + _MAX_UPPER))]


def upper_size(width: int) -> int:
    """The numbers in the upper triangle of a square matrix."""
    return width * (width + 1) // 2


def to_upper(matrix: _Floats) -> tuple[float, ...]:
    """The upper triangle of float64[p, p], row by row."""
    return tuple(matrix[np.triu_indices(len(matrix))].tolist())


def from_upper(values: npt.ArrayLike, width: int) -> _Floats:
    """The symmetric matrix, float64[..., p, p], of upper triangles, float64[..., p(p+1)/2]."""
    flat = np.asarray(values, np.float64)
    matrix = np.zeros((*flat.shape[:-1], width, width))
    rows, columns = np.triu_indices(width)
    matrix[..., rows, columns] = matrix[..., columns, rows] = flat
    return matrix


def coarsen(state: SurvivalState, edges: tuple[float, ...]) -> SurvivalState:
    """The counts in bins with these edges, which are some of the state's."""
    wanted = np.isin(state.edges, edges)
    starts = np.flatnonzero([True, *wanted])
    events, censored = (np.add.reduceat(part, starts) for part in (state.events, state.censored))
    return SurvivalState(edges, tuple(events.tolist()), tuple(censored.tolist()))


def merge_survival(a: SurvivalState, b: SurvivalState) -> SurvivalState:
    """The counts of both states together, in the bins that both have."""
    edges = tuple(edge for edge in a.edges if edge in b.edges)
    a, b = coarsen(a, edges), coarsen(b, edges)
    return SurvivalState(edges, _add(a.events, b.events), _add(a.censored, b.censored))


def add_fits(a: FitState, b: FitState) -> FitState:
    """Raises ValueError for models with different numbers of coefficients."""
    return FitState(
        a.rows + b.rows,
        _add(a.score, b.score),
        _add(a.information, b.information),
        a.deviance + b.deviance,
        a.pearson + b.pearson,
        a.base + b.base,
    )


def add_risks(a: RiskState, b: RiskState) -> RiskState:
    """Raises ValueError if bins or numbers of coefficients differ."""
    return RiskState(
        _add(a.events, b.events),
        _add(a.censored, b.censored),
        _add(a.covariates, b.covariates),
        _add(a.sums, b.sums),
    )


def _add(a: tuple[_T, ...], b: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
