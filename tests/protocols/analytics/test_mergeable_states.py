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
    HistogramState,
    QuantileState,
    compute_comoments,
    compute_histogram,
    merge,
    sketch_quantiles,
)

pytest.importorskip("ddsketch", reason="sketches come with the extra analyze")
pytest.importorskip("datasketch", reason="sketches come with the extra analyze")

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


def test_distinct_values_are_counted_once_over_all_peers() -> None:
    parts = [
        sketches.count_distinct(f"v{n}" for n in range(start, start + 6000)) for start in (0, 3000)
    ]
    together = merge(parts)
    assert isinstance(together, DistinctState)
    assert abs(sketches.estimate_distinct(together) - 9000) < 9000 * 4 * 0.0081
    assert sketches.estimate_distinct(DistinctState()) == 0


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
