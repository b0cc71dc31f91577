"""Adds noise, so that no answer reveals whether one row is in the table (Dwork et al., 2006).

Noise is added after the disclosure rules. The numbers in the released cells are (ε,
δ)-differentially private when a row is added or removed; the choice of the cells is not. ε is
divided equally among the parts of a cell. Cells have different rows, so their costs do not add up.
A cell is released only if its noisy count passes a threshold (Korolova et al., 2009); hence
`DELTA`. OpenDP draws the noise, which also protects the last bits of floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from agent.analytics.compute import Group, Places, Table
from agent.analytics.figures import compute_clipped
from agent.home.settings_schema import AgentSettings
from protocols.analytics.mergeable_states import (
    Cell,
    CountState,
    HistogramState,
    MomentsState,
    State,
)
from protocols.analytics.query import Operation, Query
from protocols.errors import Refused, UsageError
from protocols.extras import needs_extra
from protocols.privacy.events import DiscreteLaplace, Event, Failure
from protocols.tables.statistics import Moments

Number = TypeVar("Number", int, float)

#: A hundred questions with groups reach the default of the owner's `privacy.delta`.
DELTA = 1e-7
_MAX_NOISE_SCALE = 2**50


def check(question: Query, chosen: AgentSettings) -> None:
    """Raise Refused or UsageError if the owner does not allow this noise, or requires noise."""
    if not question.epsilon:
        if question.bounds:
            raise Refused("bounds without noise would show single values: leave the bounds out")
        if chosen.analyze_epsilon or chosen.privacy_max_epsilon:
            raise Refused(
                "the owner answers with noise only",
                "use --epsilon, and --bounds for columns",
            )
        return
    if not (chosen.analyze_epsilon or chosen.privacy_max_epsilon):
        raise Refused(
            f"the owner has set no privacy budget, and this question needs ε = "
            f"{question.epsilon:g}: commonweight-agent policy set analyze_epsilon 1.0"
        )
    if question.epsilon > (most := chosen.analyze_epsilon_per_question):
        raise Refused(
            f"the owner allows ε = {most:g} for a question, and this one needs "
            f"{question.epsilon:g}: commonweight-agent policy set analyze_epsilon_per_question "
            f"{question.epsilon:g}"
        )
    check_form(question)


def check_budget(question: Query, chosen: AgentSettings, spent: float) -> None:
    """Raise Refused if the owner's budget for questions does not allow one more answer. The one
    for everything is checked when the answer is charged."""
    if 0 < chosen.analyze_epsilon < spent + question.epsilon - 1e-12:
        raise Refused(
            f"the owner's budget is spent: {spent:g} of ε = {chosen.analyze_epsilon:g}, and this "
            f"query needs {question.epsilon:g}"
        )


def check_form(question: Query) -> None:
    """Raise UsageError for an operation that has no noisy form or lacks bounds."""
    for operation in question.operations:
        if operation.kind not in ("count", "missing", "sum", "mean", "histogram"):
            raise UsageError(
                f"{operation} has no answer with noise here", "count, missing, sum, mean, histogram"
            )
        name = next(iter(operation.columns), "")
        least, most = question.bounds.get(name, (0.0, 0.0))
        if operation.kind in ("sum", "mean") and not least < most:
            raise UsageError(f"noise for {operation} needs bounds", f"--bounds {name}=0..100")
        if operation.kind == "histogram" and len(operation.args) != 3:
            raise UsageError(
                "a histogram with noise needs a range", "histogram(income, 20, 0, 1e5)"
            )
        reach = _reach(operation, (least, most)) if operation.kind in ("sum", "mean") else 1.0
        if reach / _share(question) > _MAX_NOISE_SCALE:
            raise UsageError(
                f"{operation} needs more noise than can be drawn",
                "narrower --bounds, or more --epsilon",
            )


def _parts(question: Query) -> int:
    """Numbers with noise in a cell; one is the count that decides whether it is released."""
    return 1 + sum(2 if op.kind == "mean" else 1 for op in question.operations)


def _share(question: Query) -> float:
    """ε of each part of a cell."""
    return question.epsilon / _parts(question)


def cost(question: Query) -> tuple[Event, ...]:
    """What the answer costs: a row is in one cell, and in each of its parts."""
    parts = DiscreteLaplace(_share(question), _parts(question))
    return (parts, Failure(DELTA)) if question.by else (parts,)


def _middle(operation: Operation, bounds: tuple[float, float]) -> float:
    """One row changes a sum of differences from it least; for a sum it has to be 0."""
    return sum(bounds) / 2 if operation.kind == "mean" else 0.0


def _reach(operation: Operation, bounds: tuple[float, float]) -> float:
    """The most that one row changes a sum."""
    middle = _middle(operation, bounds)
    return max(abs(bound - middle) for bound in bounds) or 1.0


def answer(question: Query, table: Table, places: Mapping[Group, Places]) -> list[Cell]:
    """The cells with noise. `places`: the rows of each cell that the disclosure rules release."""
    each = _share(question)
    threshold = 1 + math.log(1 / (2 * DELTA)) / each
    cells = []
    for group, members in places.items():
        rows = _noisy(len(members), each)
        if question.by and rows < threshold:
            continue
        noised = tuple(
            _state(op, compute_clipped(op, table, members, question.bounds), question.bounds, each)
            for op in question.operations
        )
        cells.append(Cell(group, max(rows, 0), noised))
    return cells


def _state(
    operation: Operation, state: State, bounds: Mapping[str, tuple[float, float]], each: float
) -> State:
    match state:
        case CountState(count):
            return CountState(max(_noisy(count, each), 0))
        case HistogramState(counts, below, above):
            # A row is in one bin only, so all bins together cost as much as one.
            told = tuple(max(_noisy(count, each), 0) for count in counts)
            return HistogramState(told, max(_noisy(below, each), 0), max(_noisy(above, each), 0))
        case MomentsState(moments):
            least, most = bounds[operation.columns[0]]
            middle = _middle(operation, (least, most))
            reach = _reach(operation, (least, most))
            total = (moments.mean - middle) * moments.count
            total = min(max(total, -reach * moments.count), reach * moments.count)
            total = _noisy(total, each / reach)
            if operation.kind == "sum":
                # The count stays private: the sum is released as the mean of one value.
                return MomentsState(Moments(1, total, 0.0))
            count = max(_noisy(moments.count, each), 1)
            return MomentsState(Moments(count, min(max(middle + total / count, least), most), 0.0))
        case _:
            raise AssertionError(f"checked before: {operation}")


def _noisy(value: Number, epsilon: float) -> Number:
    """The value, an int or a float, with Laplace noise for a sensitivity of 1."""
    library, kind = _library(), type(value)
    domain = library.atom_domain(T=kind, **({"nan": False} if kind is float else {}))
    distance = library.absolute_distance(T=kind)
    add_laplace = library.m.make_laplace(domain, distance, scale=1 / epsilon)
    return kind(add_laplace(value))


def _library() -> ModuleType:
    with needs_extra("analyze", "noise"):
        import opendp.prelude as dp
    dp.enable_features("contrib")
    library: ModuleType = dp
    return library
