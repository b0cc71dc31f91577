"""States merge as if the rows had been together, in any order, and hostile ones are refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.analytics import sketches
from protocols.analytics.mergeable_states import (
    ALPHA,
    CountState,
    DistinctState,
    Floats,
    HistogramState,
    QuantileState,
    WithheldState,
    bin_values,
    compute_comoments,
    merge,
    quantile_keys,
    quantile_state,
    spread_bucket,
)

pytest.importorskip("ddsketch", reason="sketches come with the extra analyze")


def sketch_quantiles(values: Floats) -> QuantileState:
    """A sketch with each value in its own bin."""
    keys, counts = np.unique(quantile_keys(values), return_counts=True)
    return quantile_state(dict(zip(keys.tolist(), counts.tolist(), strict=True)))


def compute_histogram(values: Floats, bins: int, low: float, high: float) -> HistogramState:
    counts = np.bincount(bin_values(values, bins, low, high), minlength=bins + 2).tolist()
    return HistogramState(tuple(counts[1:-1]), counts[0], counts[-1])


floats = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-3), max_size=30
)


@given(floats, floats)
def test_a_sketch_of_both_is_that_of_all(a: list[float], b: list[float]) -> None:
    both = merge([sketch_quantiles(np.array(a, float)), sketch_quantiles(np.array(b, float))])
    assert both == sketch_quantiles(np.array(a + b, float))
    assert isinstance(both, QuantileState)
    ordered = sorted(a + b)
    for q in (0.0, 0.5, 1.0):
        found = sketches.quantile(both, q)
        if not ordered:
            assert found is None
            continue
        exact = ordered[int(q * (len(ordered) - 1))]
        assert found is not None
        assert abs(found - exact) <= 1.001 * ALPHA * abs(exact)


@given(floats, floats)
def test_histograms_and_comoments_add_up(a: list[float], b: list[float]) -> None:
    x, y = np.array(a, float), np.array(b, float)
    assert merge(
        [compute_histogram(x, 7, -10, 10), compute_histogram(y, 7, -10, 10)]
    ) == compute_histogram(np.concatenate([x, y]), 7, -10, 10)
    size = min(len(x), len(y))
    half = size // 2
    parts = merge(
        [compute_comoments(x[:half], y[:half]), compute_comoments(x[half:size], y[half:size])]
    )
    whole = compute_comoments(x[:size], y[:size])
    assert parts.c == pytest.approx(whole.c, rel=1e-6, abs=1e-3)  # type: ignore[union-attr]


def test_distinct_values_of_all_peers_have_bounds() -> None:
    assert merge([DistinctState(3, 3), DistinctState(7, 9)]) == DistinctState(7, 12)


def test_what_a_peer_withholds_does_not_hide_the_others() -> None:
    for states in ([CountState(5), WithheldState()], [WithheldState(), CountState(5)]):
        assert merge(states) == CountState(5)
    assert merge([WithheldState(), WithheldState()]) == WithheldState()


def test_a_histogram_without_a_range_spans_the_usual() -> None:
    values = np.random.default_rng(1).normal(50, 10, 5000)
    least, most, counts = sketches.quantile_histogram(sketch_quantiles(values), 10)
    assert sum(counts) == 5000
    assert 24 < least < 30
    assert 70 < most < 76
    assert sketches.quantile_histogram(QuantileState(), 3) == (0.0, 0.0, (0, 0, 0))


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"type":"quantiles","positive":{"1000000000":1}}',
        b'{"type":"quantiles","positive":{"5":-1}}',
        b'{"type":"quantiles","zeros":1e40}',
        b'{"type":"moments","moments":[5,1e400,0]}',
        b'{"type":"moments","moments":[-5,1,0]}',
        b'{"type":"pickle"}',
    ],
)
def test_what_no_peer_computes_is_refused(hostile: bytes) -> None:
    from protocols.analytics.mergeable_states import State

    with pytest.raises(msgspec.MsgspecError):
        msgspec.json.decode(hostile, type=State)


def test_different_kinds_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        merge([CountState(1), DistinctState()])
    with pytest.raises(ValueError, match="different bins"):
        merge([HistogramState((1, 2)), HistogramState((1,))])


@given(st.integers(-200_000, 200_000), st.integers(1, 300_000), st.integers(1, 3000))
def test_a_bucket_is_spread_over_bins_that_exist(first: int, width: int, count: int) -> None:
    found = spread_bucket(first, first + width, count)
    if not found:  # there is no number in the bucket
        return
    assert sum(found.values()) == count
    assert all(first <= key < first + width for key in found)
    state = quantile_state(found)
    msgspec.convert(msgspec.to_builtins(state, str_keys=True), QuantileState, strict=False)
