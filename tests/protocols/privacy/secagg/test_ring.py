"""Integers of the ring: bounds, weights, unbiased rounding, the same bytes for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import BadWeights, UsageError
from protocols.privacy.secagg import masks, ring
from protocols.privacy.secagg.masks import BLOCK_BYTES, KeyStream, add_masks

SEED = bytes(range(32))


def quantized(change: np.ndarray, limit: float, bits: int, weight: int = 1, ring_bits: int = 32):
    quantizer = ring.Quantizer(ring_bits, bits, weight, SEED)
    array = quantizer.quantize(change.astype(np.float32), limit)
    return array.view(f"<i{ring_bits // 8}")


@given(st.sampled_from((16, 32)), st.integers(1, 100_000))
def test_no_sum_leaves_the_ring(ring_bits: int, total_weight: int) -> None:
    half = 2 ** (ring_bits - 1)
    try:
        bits = ring.value_bits(ring_bits, total_weight)
    except UsageError:
        assert total_weight * ring.max_value(ring.MIN_VALUE_BITS) >= half
        return
    assert total_weight * ring.max_value(bits) < half
    # One bit more would not fit, or is more than a float32 has.
    assert bits == ring.MAX_VALUE_BITS or total_weight * ring.max_value(bits + 1) >= half


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=20), st.integers(1, 65_536))
def test_weights_are_small_and_in_proportion(examples: list[int], most: int) -> None:
    weights = ring.integer_weights(examples, most)
    assert all(1 <= weight <= most for weight in weights)
    for one, small in zip(examples, weights, strict=True):
        for other, large in zip(examples, weights, strict=True):
            if one <= other:
                assert small <= large


def test_equal_peers_have_the_weight_one() -> None:
    assert ring.integer_weights([60, 60, 60], 256) == [1, 1, 1]
    assert ring.integer_weights([100, 50], 16) == [2, 1]
    assert ring.integer_weights([1_000_000, 50], 16, max_examples=100) == [2, 1]


def test_rounding_has_no_bias() -> None:
    values = np.full(200_000, 0.3)
    mean = quantized(values, 127.0, 8).mean()
    # The standard deviation of the mean is .46 / sqrt(200000) = .001.
    assert abs(mean - 0.3) < 0.005


def test_a_change_beyond_the_limit_is_clipped() -> None:
    assert quantized(np.array([9.0, -9.0, 0.0]), 1.0, 8, weight=3).tolist() == [381, -381, 0]


def test_values_come_back_within_one_step() -> None:
    change = np.random.default_rng(1).uniform(-1, 1, 3 * BLOCK_BYTES).astype(np.float32)
    total = quantized(change, 1.0, 20, weight=5)
    back = ring.dequantize(total, 1.0, 20, 5)
    assert np.abs(back - change).max() <= 1.01 / ring.max_value(20)


def test_the_same_seed_gives_the_same_bytes() -> None:
    change = np.random.default_rng(1).normal(size=100_000)
    assert (quantized(change, 2.0, 12) == quantized(change, 2.0, 12)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(BadWeights, match="NaN"):
        quantized(np.array([0.0, bad]), 1.0, 8)
    with pytest.raises(BadWeights):
        ring.encode_tail([bad], 3)


def test_a_metric_that_could_overflow_the_sum_is_refused() -> None:
    largest = 2.0 ** (62 - ring.TAIL_FRACTION_BITS) / 4
    four = [ring.encode_tail([largest], 4)] * 4
    assert ring.decode_tail(sum(four[1:], four[0].copy())) == [largest * 4]
    with pytest.raises(BadWeights, match="too large"):
        ring.encode_tail([largest * 1.01], 4)


def test_a_sum_beyond_what_weights_allow_is_noticed() -> None:
    fits = np.array([10 * 127, -10 * 127], np.int32).view(np.uint32)
    assert ring.check_sum(fits, 8, 10).tolist() == [1270, -1270]
    for value in (1271, -1271):
        with pytest.raises(BadWeights, match="outside"):
            ring.check_sum(np.array([value], np.int32).view(np.uint32), 8, 10)


@given(st.integers(0, 3), st.sampled_from((np.uint16, np.uint32, np.uint64)))
def test_masks_of_pieces_are_those_of_the_whole(cut: int, dtype: type) -> None:
    whole = np.zeros(BLOCK_BYTES, dtype)
    add_masks(whole, [SEED], [bytes(32)])
    place = cut * 1001
    piece = np.zeros(len(whole) - place, dtype)
    add_masks(piece, [SEED], [bytes(32)], place)
    assert (piece == whole[place:]).all()
    add_masks(whole, [bytes(32)], [SEED])
    assert not whole.any()


@pytest.mark.parametrize("is_gcm_faster", [True, False])
@pytest.mark.parametrize("start", [0, 16, 33, 2**32 * 16 - 40])
@pytest.mark.parametrize(
    "lengths",
    [(BLOCK_BYTES, BLOCK_BYTES, 5), (1, 30, 1, 0, 7, 100), (31, 3000), (32, 16), (48, 48)],
)
def test_a_stream_is_that_of_aes_256_ctr_also_where_gcm_is_faster(
    monkeypatch: pytest.MonkeyPatch, is_gcm_faster: bool, start: int, lengths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(masks, "_is_gcm_faster", lambda: is_gcm_faster)
    assert stream(start, lengths) == aes_256_ctr(start, sum(lengths))


def test_a_stream_goes_on_with_ctr_where_the_counter_of_gcm_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks, "_is_gcm_faster", lambda: True)
    assert masks._GCM_STOP == 2**32 * 16, "GCM counts in 32 bits"
    monkeypatch.setattr(masks, "_GCM_STOP", 4096)
    for lengths in ((3000, 3000, 3000), (4096, 16), (4000, 96, 1)):
        assert stream(0, lengths) == aes_256_ctr(0, sum(lengths))


def stream(start: int, lengths: tuple[int, ...]) -> bytes:
    opened = KeyStream(SEED, start)
    return b"".join(opened.read(nbytes).tobytes() for nbytes in lengths)


def aes_256_ctr(start: int, nbytes: int) -> bytes:
    """The stream with counters from 0 on in 128 bits."""
    counter = (start // 16).to_bytes(16, "big")
    cipher = Cipher(algorithms.AES256(SEED), modes.CTR(counter)).encryptor()
    return cipher.update(bytes(start % 16 + nbytes))[start % 16 :]
