"""The states of an answer as sums that add up over peers, without rounding, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from msgspec import UNSET

from protocols.analytics import mergeable_states as stats
from protocols.analytics.mergeable_states import State
from protocols.analytics.model_states import (
    FitState,
    LevelsState,
    RiskState,
    SurvivalState,
    coarsen,
    upper_size,
)
from protocols.analytics.query import Operation
from protocols.errors import BadMessage
from protocols.tables.statistics import Moments


def sums_of(state: State, level: str, edges: tuple[float, ...]) -> list[Fraction]:
    """The sums of a state, which add up over peers."""
    found: Sequence[float | Fraction]
    match state:
        case stats.CountState(count):
            found = [count]
        case stats.MomentsState(moments):
            found = [moments.count, *_power_sums(moments)]
        case stats.ComomentsState(x, y, c):
            products = Fraction(c) + x.count * Fraction(x.mean) * Fraction(y.mean)
            found = [x.count, *_power_sums(x), *_power_sums(y), products]
        case stats.HistogramState(counts, below, above):
            found = [(*counts, below, above)[int(level)]]
        case LevelsState(by_level):
            found = [by_level[level]]
        case SurvivalState():
            if list(edges) != sorted({*edges} & {*state.edges}):
                raise BadMessage("the layout of the sums has other time bins than this peer tells")
            coarse = coarsen(state, edges)
            found = [*coarse.events, *coarse.censored]
        case FitState():
            sums = (*state.score, *state.information, state.deviance, state.pearson, state.base)
            found = [state.rows, *sums]
        case RiskState():
            found = [*state.events, *state.censored, *state.covariates, *state.sums]
        case _:
            raise BadMessage(f"{type(state).__name__} has no sums")
    return [Fraction(number) for number in found]


def _power_sums(moments: Moments) -> tuple[Fraction, Fraction]:
    """The sum of the values and that of their squares, without rounding."""
    total = moments.count * Fraction(moments.mean)
    return total, Fraction(moments.m2) + total * Fraction(moments.mean)


def state_of(
    operation: Operation, edges: tuple[float, ...], numbers: Iterator[Fraction], num_edges: int
) -> State:
    """The state with these sums; without any, that of no row."""

    def floats(count: int) -> tuple[float, ...]:
        return tuple(float(next(numbers, Fraction())) for _ in range(count))

    def counts(count: int) -> tuple[int, ...]:
        return tuple(count_of(numbers) for _ in range(count))

    model = operation.model
    width, bins = (0, 1) if model is UNSET else (len(model.at), len(model.edges) + 1)
    match operation.kind:
        case "count" | "missing":
            return stats.CountState(count_of(numbers))
        case "cov" | "corr":
            return _comoments(numbers)
        case "histogram":
            return stats.HistogramState(counts(int(operation.args[0])), *counts(2))
        case "survival":
            return SurvivalState(edges, counts(num_edges + 1), counts(num_edges + 1))
        case "glm":
            rows = count_of(numbers)
            return FitState(rows, floats(width), floats(upper_size(width)), *floats(3))
        case "cox":
            sums = 2 * bins * (1 + width + upper_size(width))
            return RiskState(counts(bins), counts(bins), floats(width), floats(sums))
    return stats.MomentsState(_moments(count_of(numbers), numbers)[0])


def count_of(numbers: Iterator[Fraction]) -> int:
    """The next number, which is a count. Raises ValueError."""
    number = next(numbers, Fraction())
    if number < 0 or number.denominator != 1 or number > 1 << 53:
        raise ValueError(f"{float(number):g} is no count of rows")
    return int(number)


def _moments(count: int, numbers: Iterator[Fraction]) -> tuple[Moments, Fraction]:
    """The moments from the next two sums, and the mean without rounding."""
    total, squares = next(numbers, Fraction()), next(numbers, Fraction())
    if not count:
        return Moments(), Fraction()
    mean = total / count
    # Rounding of the peers' own means and sums can make it negative if all values are alike.
    m2 = max(Fraction(), squares - total * mean)
    return Moments(count, float(mean), float(m2)), mean


def _comoments(numbers: Iterator[Fraction]) -> stats.ComomentsState:
    count = count_of(numbers)
    x, mean_x = _moments(count, numbers)
    y, mean_y = _moments(count, numbers)
    products = next(numbers, Fraction())
    return stats.ComomentsState(x, y, float(products - count * mean_x * mean_y))
