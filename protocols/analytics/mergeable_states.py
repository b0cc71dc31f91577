"""What peers tell instead of rows: sufficient statistics that merge. Pure numpy.

Moments and comoments by Chan, Golub and LeVeque (1979); quantiles by DDSketch (Masson, Rim and Lee,
2019, relative error `ALPHA`); distinct values by HyperLogLog++ (Heule, Nunkesser and Hall, 2013,
`2**PRECISION` registers: standard error 0.8 %). They travel as plain numbers, so that what a peer
sends can be checked before a library of sketches sees it. Merging is associative and commutative,
up to float64 rounding for the moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from protocols.messages.envelope import Count, Text
from protocols.tables.statistics import Finite, Moments, merge_moments

#: Relative error of a quantile; bin i holds what lies in (GAMMA^(i-1), GAMMA^i].
ALPHA = 0.005
GAMMA = (1 + ALPHA) / (1 - ALPHA)
#: Values nearer to 0 than this count as 0 in a quantile.
TINY = 1e-300
PRECISION = 14
_MAX_BINS = 16_384
#: All finite floats lie in these bins.
_Bin = Annotated[int, Meta(ge=-72_000, le=72_000)]

Floats = npt.NDArray[np.float64]


class CountState(Struct, frozen=True, tag="count"):
    """So many rows; also of missing values."""

    count: Count = 0


class MomentsState(Struct, frozen=True, tag="moments"):
    """Of a column: sum, mean, variance."""

    moments: Moments = Moments()


class RangeState(Struct, frozen=True, tag="range"):
    """Least and most; None for no value."""

    least: Finite | None = None
    most: Finite | None = None


class ComomentsState(Struct, frozen=True, tag="comoments"):
    """Of two columns, over rows that have both: their moments and `c`, the sum of products of
    differences from the means."""

    x: Moments = Moments()
    y: Moments = Moments()
    c: Finite = 0.0


class HistogramState(Struct, frozen=True, tag="histogram"):
    """Counts in equal bins, and below and above all of them."""

    counts: Annotated[tuple[Count, ...], Meta(max_length=1000)] = ()
    below: Count = 0
    above: Count = 0


class QuantileState(Struct, frozen=True, tag="quantiles"):
    """Counts by bin of a DDSketch, by sign; and zeros."""

    positive: Annotated[dict[_Bin, Count], Meta(max_length=_MAX_BINS)] = {}
    negative: Annotated[dict[_Bin, Count], Meta(max_length=_MAX_BINS)] = {}
    zeros: Count = 0


class DistinctState(Struct, frozen=True, tag="distinct"):
    """HyperLogLog registers, one byte each; empty for no value."""

    registers: Annotated[bytes, Meta(max_length=1 << PRECISION)] = b""


State = (
    CountState
    | MomentsState
    | RangeState
    | ComomentsState
    | HistogramState
    | QuantileState
    | DistinctState
)


class Cell(Struct, frozen=True):
    """One group: its values in the grouping columns (None: missing), rows, a state a figure."""

    group: Annotated[tuple[Text | None, ...], Meta(max_length=3)]
    rows: Count
    states: Annotated[tuple[State, ...], Meta(max_length=32)]


class PeerAnswer(Struct, frozen=True, kw_only=True):
    """A peer's answer. `rows` are those of its table, `kept_back` those in cells that it keeps.

    `kinds`: what each column of the question holds there. `refused`: why it answers nothing.
    """

    rows: Count = 0
    kept_back: Count = 0
    kinds: dict[Text, Text] = {}
    cells: Annotated[tuple[Cell, ...], Meta(max_length=2000)] = ()
    refused: Text = ""


# --- making ----------------------------------------------------------------------------------


def compute_comoments(x: Floats, y: Floats) -> ComomentsState:
    """Of two columns, float64[n] each, without NaN."""
    if not len(x):
        return ComomentsState()
    mean_x, mean_y = float(x.mean()), float(y.mean())
    dx, dy = x - mean_x, y - mean_y
    return ComomentsState(
        Moments(len(x), mean_x, float(dx @ dx)),
        Moments(len(y), mean_y, float(dy @ dy)),
        float(dx @ dy),
    )


def compute_histogram(values: Floats, bins: int, least: float, most: float) -> HistogramState:
    """Counts in `bins` equal bins from `least` to `most`; each bin has its lower edge, the last
    one both."""
    inside = (values >= least) & (values <= most)
    place = ((values[inside] - least) * (bins / (most - least))).astype(np.int64)
    counts = np.bincount(np.minimum(place, bins - 1), minlength=bins)
    below, above = int((values < least).sum()), int((values > most).sum())
    return HistogramState(tuple(counts.tolist()), below, above)


def sketch_quantiles(values: Floats) -> QuantileState:
    """A DDSketch of float64[n] without NaN."""
    size = np.abs(values)
    return QuantileState(
        _bins(values[(values > 0) & (size > TINY)]),
        _bins(-values[(values < 0) & (size > TINY)]),
        int((size <= TINY).sum()),
    )


def _bins(values: Floats) -> dict[int, int]:
    places, counts = np.unique(
        np.ceil(np.log(values) / math.log(GAMMA)).astype(np.int64), return_counts=True
    )
    return dict(zip(places.tolist(), counts.tolist(), strict=True))


# --- merging ---------------------------------------------------------------------------------


def merge(states: Iterable[State]) -> State:
    """The state of all parts together. Raises ValueError for states of different kinds."""
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
                raise ValueError("histograms of different bins")
            counts = tuple(x + y for x, y in zip(a.counts, b.counts, strict=True))
            return HistogramState(counts, a.below + b.below, a.above + b.above)
        case QuantileState(), QuantileState():
            return QuantileState(
                _add_counts(a.positive, b.positive),
                _add_counts(a.negative, b.negative),
                a.zeros + b.zeros,
            )
        case DistinctState(), DistinctState():
            return _merge_distinct(a, b)
        case _:
            raise ValueError(f"{type(a).__name__} and {type(b).__name__} do not merge")


def _merge_comoments(a: ComomentsState, b: ComomentsState) -> ComomentsState:
    if not a.x.count or not b.x.count:
        return a if a.x.count else b
    count = a.x.count + b.x.count
    cross = (b.x.mean - a.x.mean) * (b.y.mean - a.y.mean) * (a.x.count * b.x.count / count)
    return ComomentsState(merge_moments(a.x, b.x), merge_moments(a.y, b.y), a.c + b.c + cross)


def _add_counts(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    return {place: a.get(place, 0) + b.get(place, 0) for place in sorted(a.keys() | b.keys())}


def _merge_distinct(a: DistinctState, b: DistinctState) -> DistinctState:
    if not a.registers or not b.registers:
        return a if a.registers else b
    if len(a.registers) != len(b.registers):
        raise ValueError("registers of different precision")
    x, y = (np.frombuffer(state.registers, np.uint8) for state in (a, b))
    return DistinctState(np.maximum(x, y).tobytes())
