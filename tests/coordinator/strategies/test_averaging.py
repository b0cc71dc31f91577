"""The weighted mean: shares, dtypes, rounding, and the same bytes whoever came first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coordinator.strategies import averaging
from protocols.model import weights
from protocols.model.bfloat16 import float32_to_bf16
from protocols.model.weights import Weights

COUNTS = st.dictionaries(
    st.sampled_from("ABCDEFGH"), st.integers(1, 10_000_000), min_size=1, max_size=8
)
FLOATS = st.floats(-1e6, 1e6, width=32)


def weighted_mean(
    updates: Sequence[Weights],
    share: Sequence[float],
    base: Weights,
    scale: Sequence[float] | None = None,
) -> Weights:
    """The mean of small models in memory, without a strategy in between."""
    flat = {name: np.array(base[name]).reshape(-1) for name in base}
    scale = scale or [1.0] * len(updates)
    for piece in averaging.average(updates, share, scale, base, lambda mean: mean):
        for part, array in piece.items():
            flat[part.name][part.start : part.stop] = array
    bf16 = [name for name, spec in base.schema.items() if spec.dtype == "BF16"]
    return Weights({n: array.reshape(base.schema[n].shape) for n, array in flat.items()}, bf16)


@given(COUNTS, st.booleans(), st.floats(0.01, 1.0))
def test_shares_add_up_to_one_and_respect_the_cap(
    counts: dict[str, int], equal: bool, cap: float
) -> None:
    share = averaging.shares(dict.fromkeys(counts, 1) if equal else counts, cap=cap)
    assert share.keys() == counts.keys()
    assert sum(share.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(part > 0 for part in share.values())
    assert max(share.values()) <= max(cap, 1 / len(counts)) * (1 + 1e-9)
    # Nobody with more examples has the smaller share.
    ranked = sorted(counts, key=lambda peer: counts[peer])
    for less, more in itertools.pairwise(ranked):
        assert share[less] <= share[more] * (1 + 1e-9)


@given(COUNTS)
def test_without_a_cap_shares_are_proportions(counts: dict[str, int]) -> None:
    share = averaging.shares(counts, cap=1.0)
    total = sum(counts.values())
    assert share == {peer: pytest.approx(count / total) for peer, count in counts.items()}
    equal = averaging.shares(dict.fromkeys(counts, 1), cap=1.0)
    assert set(equal.values()) == {1 / len(counts)}


def test_what_is_cut_off_is_spread_in_proportion() -> None:
    share = averaging.shares({"A": 80, "B": 15, "C": 5}, cap=0.5)
    assert share == {"A": 0.5, "B": pytest.approx(0.375), "C": pytest.approx(0.125)}
    # B comes above the cap only by what A had too much.
    share = averaging.shares({"A": 80, "B": 15, "C": 5}, cap=0.36)
    assert share == {"A": 0.36, "B": 0.36, "C": pytest.approx(0.28)}
    assert averaging.shares({"A": 7}, cap=0.1) == {"A": 1.0}


def vectors(count: int) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float32, (count, 5), elements=FLOATS)


@given(st.integers(1, 6).flatmap(vectors), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_show(rows: Any, rng: Any) -> None:
    """The run sums in name order: the same updates give the same bytes."""
    peers = [f"P{i}" for i in range(len(rows))]
    base = Weights({"w": np.zeros(5, np.float32)})

    def fold(arrived: list[str]) -> str:
        updates = {peer: Weights({"w": rows[peers.index(peer)]}) for peer in arrived}
        counts = {peer: 1 + peers.index(peer) for peer in arrived}
        share = averaging.shares(counts, cap=1.0)
        names = sorted(updates)
        mean = weighted_mean([updates[n] for n in names], [share[n] for n in names], base)
        return weights.digest(mean)

    shuffled = list(peers)
    rng.shuffle(shuffled)
    assert fold(shuffled) == fold(peers)


@given(st.integers(1, 6).flatmap(vectors), st.data())
def test_the_mean_is_that_of_numpy(rows: Any, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 1000), min_size=len(rows), max_size=len(rows)))
    share = [count / sum(counts) for count in counts]
    base = Weights({"w": np.zeros(5, np.float32)})
    mean = weighted_mean([Weights({"w": row}) for row in rows], share, base)
    expected = np.average(rows.astype(np.float64), axis=0, weights=counts).astype(np.float32)
    np.testing.assert_allclose(mean["w"], expected, rtol=1e-6, atol=1e-6)
    assert mean["w"].dtype == np.float32


@given(hnp.arrays(np.float32, 7, elements=FLOATS), COUNTS)
def test_equal_updates_have_themselves_as_mean(row: Any, counts: dict[str, int]) -> None:
    share = list(averaging.shares(counts, cap=1.0).values())
    half = row.clip(-6e4, 6e4).astype(np.float16)
    bits = (row.view(np.uint32) >> 16).astype(np.uint16)
    model = Weights({"f32": row, "f16": half, "bf16": bits}, ["bf16"])
    mean = weighted_mean([model] * len(share), share, model)
    assert mean.schema == model.schema
    # A negative zero comes back as zero: it is equal, and the sum starts at zero.
    for name in ("f32", "f16"):
        np.testing.assert_array_equal(mean[name], model[name])
    np.testing.assert_array_equal(mean["bf16"] & 0x7FFF, bits & 0x7FFF)


def test_integers_and_booleans_keep_the_bases_value() -> None:
    base = Weights({"steps": np.array(7, np.int64), "mask": np.array([True, False])})
    update = Weights({"steps": np.array(99, np.int64), "mask": np.array([False, True])})
    mean = weighted_mean([update, update], [0.5, 0.5], base)
    assert mean.schema == base.schema
    assert int(mean["steps"]) == 7
    assert mean["mask"].tolist() == [True, False]


def test_scalars_and_empty_tensors_are_averaged() -> None:
    def model(value: float) -> Weights:
        bits = np.array(np.float32(value)).view(np.uint32) >> 16
        return Weights(
            {
                "scalar": np.array(value, np.float32),
                "empty": np.zeros((0, 3), np.float32),
                "bits": np.asarray(bits).astype(np.uint16),
            },
            ["bits"],
        )

    mean = weighted_mean([model(1.0), model(3.0)], [0.5, 0.5], model(0.0))
    assert mean.schema == model(0.0).schema
    assert weights.digest(mean) == weights.digest(model(2.0))


def test_the_largest_numbers_do_not_overflow() -> None:
    most = np.finfo(np.float32).max
    model = Weights({"w": np.array([most, -most], np.float32)})
    share = list(averaging.shares(dict.fromkeys("ABC", 1), cap=1.0).values())
    mean = weighted_mean([model] * 3, share, model)
    weights.check_finite(mean)


def nearest_bf16(value: np.float32) -> int:
    """Round to nearest, ties to even, by exact fractions."""
    bits = int(value.view(np.uint32))
    low = bits >> 16

    def exact(top: int) -> Fraction:
        return Fraction(float(np.array(top << 16, np.uint32).view(np.float32)))

    if not bits & 0xFFFF:
        return low
    if not np.isfinite(np.array((low + 1) << 16, np.uint32).view(np.float32)):
        return -1  # between the largest number and infinity: not looked at here
    below = abs(Fraction(float(value)) - exact(low))
    above = abs(exact(low + 1) - Fraction(float(value)))
    if below == above:
        return low if low % 2 == 0 else low + 1
    return low if below < above else low + 1


@given(
    hnp.arrays(
        np.uint32,
        8,
        elements=st.one_of(
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**16 - 1).map(lambda top: top << 16 | 0x8000),  # ties
        ),
    )
)
def test_bf16_is_rounded_to_nearest_even(bits: Any) -> None:
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = [nearest_bf16(value) for value in values]
    for got, wanted in zip(float32_to_bf16(values).tolist(), expected, strict=True):
        assert wanted in (-1, got)


@given(
    hnp.arrays(np.float32, (3, 37), elements=FLOATS),
    st.integers(4, 200),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_the_size_of_the_pieces_does_not_show(rows: Any, limit_bytes: int, scale: Any) -> None:
    """A version's digest must not depend on how much memory there was."""
    base = Weights({"a": np.ones(17, np.float32), "b": np.ones((4, 5), np.float32)})
    updates = [Weights({"a": row[:17], "b": row[17:].reshape(4, 5)}) for row in rows]
    share = [0.2, 0.3, 0.5]
    whole = weighted_mean(updates, share, base, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            averaging,
            "split_into_pieces",
            lambda schema: weights.split_into_pieces(schema, limit_bytes),
        )
        assert weights.digest(weighted_mean(updates, share, base, scale)) == (weights.digest(whole))


def test_clipping_moves_an_update_towards_the_base() -> None:
    base, update = Weights({"w": np.array([1.0])}), Weights({"w": np.array([5.0])})
    for scale, expected in ((1.0, 5.0), (0.5, 3.0), (0.0, 1.0)):
        mean = weighted_mean([update], [1.0], base, [scale])
        assert float(mean["w"][0]) == expected
