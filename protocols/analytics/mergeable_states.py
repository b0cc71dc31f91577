"""Mergeable statistics that peers send instead of rows. Pure numpy.

Moments and comoments: Chan, Golub and LeVeque (1979). Quantiles: bins of DDSketch (Masson, Rim and
Lee, 2019, relative error `ALPHA`), in which a peer has spread the rows of wider buckets. They are
sent as plain numbers, so they can be checked before a sketch library reads them. Merging is
associative and commutative, up to float64 rounding of the moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from protocols.analytics.model_states import (
    ColumnsState,
    FitState,
    LevelsState,
    RiskState,
    SurvivalState,
    add_fits,
    add_risks,
    merge_survival,
)
from protocols.analytics.row_sets import FigureRows
from protocols.messages.envelope import Count, Text
from protocols.tables.statistics import Finite, Moments, merge_moments

#: Relative error of a quantile; bin i counts values in (GAMMA^(i-1), GAMMA^i].
ALPHA = 0.005
GAMMA = (1 + ALPHA) / (1 - ALPHA)
#: Values closer to 0 count as 0 in a quantile.
TINY = 1e-300
_MAX_BINS = 16_384
#: Bins from -MAX_BIN to MAX_BIN cover all finite floats.
MAX_BIN = 72_000
_Bin = Annotated[int, Meta(ge=-MAX_BIN, le=MAX_BIN)]
#: The key of bin 0 of the positive values. All keys are below MAX_KEY.
_FIRST_KEY, MAX_KEY = 1 << 17, 1 << 18

_Key = TypeVar("_Key", int, str)
Floats = npt.NDArray[np.float64]
Keys = npt.NDArray[np.int64]


class CountState(Struct, frozen=True, tag="count"):
    """A number of rows, or of missing values."""

    count: Count = 0


class MomentsState(Struct, frozen=True, tag="moments"):
    """For the sum, mean and variance of a column."""

    moments: Moments = Moments()


class RangeState(Struct, frozen=True, tag="range"):
    """Minimum and maximum; None without values."""

    least: Finite | None = None
    most: Finite | None = None


class ComomentsState(Struct, frozen=True, tag="comoments"):
    """For covariance and correlation of two columns, over rows that have both.

    `c` is the sum of products of the differences from the means.
    """

    x: Moments = Moments()
    y: Moments = Moments()
    c: Finite = 0.0


class HistogramState(Struct, frozen=True, tag="histogram"):
    """Counts in equal bins, and counts below and above them."""

    counts: Annotated[tuple[Count, ...], Meta(max_length=1000)] = ()
    below: Count = 0
    above: Count = 0


class QuantileState(Struct, frozen=True, tag="quantiles"):
    """A DDSketch: counts by bin of positive and of negative values, and zeros."""

    positive: Annotated[dict[_Bin, Count], Meta(max_length=_MAX_BINS)] = {}
    negative: Annotated[dict[_Bin, Count], Meta(max_length=_MAX_BINS)] = {}
    zeros: Count = 0


class DistinctState(Struct, frozen=True, tag="values"):
    """The number of different values: at least `least`, at most `most`.

    Peers send these two numbers instead of a sketch of their values, because a sketch shows for
    each text whether a peer has it. The numbers do not show whether two peers share values.
    """

    least: Count = 0
    most: Count = 0


class WithheldState(Struct, frozen=True, tag="withheld"):
    """A withheld figure, which would describe too few rows."""


State = (
    CountState
    | MomentsState
    | RangeState
    | ComomentsState
    | HistogramState
    | QuantileState
    | DistinctState
    | ColumnsState
    | LevelsState
    | SurvivalState
    | FitState
    | RiskState
    | WithheldState
)


class Cell(Struct, frozen=True):
    """A group: its values in the grouping columns (None: missing), rows, a state per operation."""

    group: Annotated[tuple[Text | None, ...], Meta(max_length=3)]
    rows: Count
    states: Annotated[tuple[State, ...], Meta(max_length=32)]


#: Why a peer answers no question without --secure, in its `refused`.
IN_SUMS_ALONE = "in secure sums alone"


class PeerAnswer(Struct, frozen=True, kw_only=True):
    """A peer's answer. `rows` counts the rows of its cells; withheld cells do not count.

    `similar`: some cells equal those of an earlier question, or differ from them in a few rows.
    `kinds`: the kind of each column of the query. `refused`: why the peer refused the query.
    `rows_of`: in a secure question, the rows behind each cell, and then behind each of its figures.
    """

    rows: Count = 0
    similar: bool = False
    kinds: Annotated[dict[Text, Text], Meta(max_length=128)] = {}
    cells: Annotated[tuple[Cell, ...], Meta(max_length=2000)] = ()
    refused: Text = ""
    rows_of: Annotated[
        tuple[Annotated[tuple[FigureRows, ...], Meta(max_length=33)], ...], Meta(max_length=2000)
    ] = ()


# --- computing -------------------------------------------------------------------------------


def compute_comoments(x: Floats, y: Floats) -> ComomentsState:
    """The comoments of two columns, float64[n] each, without NaN."""
    if not len(x):
        return ComomentsState()
    mean_x, mean_y = float(x.mean()), float(y.mean())
    dx, dy = x - mean_x, y - mean_y
    return ComomentsState(
        Moments(len(x), mean_x, float(dx @ dx)),
        Moments(len(y), mean_y, float(dy @ dy)),
        float(dx @ dy),
    )


def bin_values(values: Floats, bins: int, low: float, high: float) -> Keys:
    """The bin of each value, int64[n]: 0 below `low`, 1 to `bins`, `bins + 1` above `high`.

    A bin includes its lower edge; the last bin also includes its upper edge.
    """
    inside = (values >= low) & (values <= high)
    found = np.where(values < low, 0, bins + 1)
    scaled = ((values[inside] - low) * (bins / (high - low))).astype(np.int64)
    found[inside] = np.clip(scaled, 0, bins - 1) + 1
    return found


def quantile_keys(values: Floats) -> Keys:
    """The bins of float64[n] without NaN as int64[n], in the order of the values; 0 for zero."""
    size = np.abs(values)
    keys = np.zeros(len(values), np.int64)
    some = size > TINY
    bins = np.ceil(np.log(size[some]) / math.log(GAMMA)).astype(np.int64)
    keys[some] = np.sign(values[some]).astype(np.int64) * (bins + _FIRST_KEY)
    return keys


def spread_bucket(first: int, stop: int, count: int) -> dict[int, int]:
    """A bucket of `count` rows with keys from `first` to `stop`: counts of evenly spaced keys."""
    keys = np.arange(first, stop)
    keys = keys[(keys == 0) | (np.abs(np.abs(keys) - _FIRST_KEY) <= MAX_BIN)]
    if not len(keys):
        return {}
    chosen = keys[(np.arange(count) * 2 + 1) * len(keys) // (2 * count)]
    found, counts = np.unique(chosen, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def quantile_state(counts: Mapping[int, int]) -> QuantileState:
    """The state for counts by key."""
    positive = {key - _FIRST_KEY: count for key, count in counts.items() if key > 0}
    negative = {-key - _FIRST_KEY: count for key, count in counts.items() if key < 0}
    return QuantileState(positive, negative, counts.get(0, 0))


# --- merging ---------------------------------------------------------------------------------


def merge(states: Iterable[State]) -> State:
    """The state of all parts together. Raises ValueError for different types of states."""
    return reduce(_merge_pair, states)


def _merge_pair(a: State, b: State) -> State:
    match a, b:
        case CountState(), CountState():
            return CountState(a.count + b.count)
        case MomentsState(), MomentsState():
            return MomentsState(merge_moments(a.moments, b.moments))
        case RangeState(), RangeState():
            least = [r.least for r in (a, b) if r.least is not None]
            most = [r.most for r in (a, b) if r.most is not None]
            return RangeState(min(least, default=None), max(most, default=None))
        case ComomentsState(), ComomentsState():
            return _merge_comoments(a, b)
        case HistogramState(), HistogramState():
            if len(a.counts) != len(b.counts):
                raise ValueError("histograms with different bins")
            counts = tuple(x + y for x, y in zip(a.counts, b.counts, strict=True))
            return HistogramState(counts, a.below + b.below, a.above + b.above)
        case QuantileState(), QuantileState():
            return QuantileState(
                _add_counts(a.positive, b.positive),
                _add_counts(a.negative, b.negative),
                a.zeros + b.zeros,
            )
        case DistinctState(), DistinctState():
            return DistinctState(max(a.least, b.least), a.most + b.most)
        case ColumnsState(), ColumnsState():
            return ColumnsState(tuple(name for name in a.names if name in b.names))
        case LevelsState(), LevelsState():
            return LevelsState(_add_counts(a.counts, b.counts))
        case SurvivalState(), SurvivalState():
            return merge_survival(a, b)
        case FitState(), FitState():
            return add_fits(a, b)
        case RiskState(), RiskState():
            return add_risks(a, b)
        case (WithheldState(), other) | (other, WithheldState()):
            return other
        case _:
            raise ValueError(f"{type(a).__name__} and {type(b).__name__} cannot be merged")


def _merge_comoments(a: ComomentsState, b: ComomentsState) -> ComomentsState:
    if not a.x.count or not b.x.count:
        return a if a.x.count else b
    count = a.x.count + b.x.count
    cross = (b.x.mean - a.x.mean) * (b.y.mean - a.y.mean) * (a.x.count * b.x.count / count)
    return ComomentsState(merge_moments(a.x, b.x), merge_moments(a.y, b.y), a.c + b.c + cross)


def _add_counts(a: dict[_Key, int], b: dict[_Key, int]) -> dict[_Key, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted(a.keys() | b.keys())}
