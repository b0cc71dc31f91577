"""Noise, so that no answer tells whether one row is in the table (Dwork et al., 2006).

An answer is (ε, δ)-differentially private towards a row that is added or removed: ε is shared out
equally among the parts of each cell, and cells are of different rows, so they do not add up. Which
cells there are is told only of those whose noisy count passes a threshold (Korolova et al., 2009),
which is where `DELTA` comes from. OpenDP draws the noise: its floats hide their last bits too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

from agent.analytics.compute import GroupedResult
from protocols.analytics.mergeable_states import (
    Cell,
    CountState,
    HistogramState,
    MomentsState,
    PeerAnswer,
    State,
)
from protocols.analytics.query import Operation, Query
from protocols.errors import CommonweightError, Refused, UsageError
from protocols.tables.statistics import Moments

DELTA = 1e-6
_MAX_NOISE_SCALE = 2**50


def check(question: Query, budget: float, spent: float) -> None:
    """Raise Refused or UsageError if this cannot be answered with noise, or not any more."""
    if question.epsilon <= 0:
        raise Refused(
            "the owner tells answers with noise only",
            "ask with --epsilon, and --bounds for columns",
        )
    if spent + question.epsilon > budget + 1e-12:
        raise Refused(
            f"the owner's budget is spent: {spent:g} of ε = {budget:g}, and this takes "
            f"{question.epsilon:g}"
        )
    check_form(question)


def check_form(question: Query) -> None:
    """Raise UsageError for what has no noisy form, or lacks bounds."""
    for operation in question.operations:
        if operation.kind not in ("count", "missing", "sum", "mean", "histogram"):
            raise UsageError(
                f"{operation} has no answer with noise here", "count, missing, sum, mean, histogram"
            )
        if operation.kind in ("sum", "mean") and operation.columns[0] not in question.bounds:
            name = operation.columns[0]
            raise UsageError(f"noise for {operation} needs bounds", f"--bounds {name}=0..100")
        if operation.kind == "histogram" and len(operation.args) != 3:
            raise UsageError(
                "a histogram with noise needs a range", "histogram(income, 20, 0, 1e5)"
            )


def add_noise(question: Query, computed: GroupedResult) -> PeerAnswer:
    """The answer with noise. Means and sums must have been computed of values within bounds."""
    # A share for the count that decides whether a cell is told, one for the number of rows.
    shares = 1 + sum(2 if op.kind == "mean" else 1 for op in question.operations)
    each = question.epsilon / (shares + 1)
    threshold = 1 + math.log(1 / (2 * DELTA)) / each
    cells = []
    for group, states in computed.cells.items():
        rows = _noisy_int(int(computed.members[group].sum()), each)
        if question.by and rows < threshold:
            continue
        noised = tuple(
            _state(operation, state, question.bounds, each)
            for operation, state in zip(question.operations, states, strict=True)
        )
        cells.append(Cell(group, max(rows, 0), noised))
    return PeerAnswer(
        rows=max(_noisy_int(computed.rows, each), 0),
        kinds={name: str(kind) for name, kind in computed.kinds.items()},
        cells=tuple(cells),
    )


def _state(
    operation: Operation, state: State, bounds: Mapping[str, tuple[float, float]], each: float
) -> State:
    match state:
        case CountState(count):
            return CountState(max(_noisy_int(count, each), 0))
        case HistogramState(counts, below, above):
            # One row is in one bin: together they cost what one does.
            told = tuple(max(_noisy_int(count, each), 0) for count in counts)
            return HistogramState(
                told, max(_noisy_int(below, each), 0), max(_noisy_int(above, each), 0)
            )
        case MomentsState(moments):
            least, most = bounds[operation.columns[0]]
            middle = (least + most) / 2 if operation.kind == "mean" else 0.0
            # Around the middle of the bounds a mean's sum is moved least by one row.
            reach = max(abs(least - middle), abs(most - middle)) or 1.0
            total = (moments.mean - middle) * moments.count
            total = min(max(total, -reach * moments.count), reach * moments.count)
            total = _noisy_float(total, each / reach)
            if operation.kind == "sum":
                # The count beside it is nobody's affair: the sum is told as one value's mean.
                return MomentsState(Moments(1, total, 0.0))
            count = max(_noisy_int(moments.count, each), 1)
            return MomentsState(Moments(count, min(max(middle + total / count, least), most), 0.0))
        case _:
            raise AssertionError(f"checked before: {operation}")


def _noisy_int(value: int, epsilon: float) -> int:
    library = _library()
    scale = min(1 / epsilon, float(_MAX_NOISE_SCALE))
    made = library.m.make_laplace(
        library.atom_domain(T=int), library.absolute_distance(T=int), scale=scale
    )
    return int(made(value))


def _noisy_float(value: float, epsilon: float) -> float:
    library = _library()
    made = library.m.make_laplace(
        library.atom_domain(T=float, nan=False),
        library.absolute_distance(T=float),
        scale=min(1 / epsilon, float(_MAX_NOISE_SCALE)),
    )
    return float(made(value))


def _library() -> ModuleType:
    try:
        import opendp.prelude as dp
    except ImportError as err:
        raise CommonweightError(
            "noise is made by OpenDP, which is not installed on this peer",
            "pip install 'commonweight[analyze]'",
        ) from err
    dp.enable_features("contrib")
    library: ModuleType = dp
    return library
