"""The mean of products as factors: exact up to the rank, and the best beyond it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from coordinator.strategies import svd
from protocols.codecs import registry
from protocols.codecs.factors import A, B
from protocols.codecs.registry import FactoredUpdate
from protocols.model import weights
from protocols.model.weights import Array, Weights

LAYERS = {"m.q": (30, 20), "m.v": (8, 20)}


def adapters(seed: int, rank: int) -> Weights:
    draw = np.random.default_rng(seed)
    found: dict[str, Array] = {"head": draw.normal(size=5).astype(np.float32)}
    for layer, (out, inputs) in LAYERS.items():
        found[layer + A] = draw.normal(size=(rank, inputs)).astype(np.float32)
        found[layer + B] = draw.normal(size=(out, rank)).astype(np.float32)
    return Weights(found)


def merged(
    updates: Sequence[Weights],
    share: Sequence[float],
    base: Weights,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
) -> Weights:
    codec = registry.parse("factors:64")
    opened = [registry.open_update(codec, one, codec.base(base)) for one in updates]
    found: dict[str, list[Array]] = {}
    readers = [one for one in opened if isinstance(one, FactoredUpdate)]
    for piece in svd.aggregate(readers, share, scale, base):
        for part, array in piece.items():
            found.setdefault(part.name, []).append(array)
    return Weights(
        {name: np.concatenate(a).reshape(base.schema[name].shape) for name, a in found.items()}
    )


def product(model: Weights, layer: str) -> Array:
    return model[layer + B].astype(np.float64) @ model[layer + A].astype(np.float64)


SHARE = (0.5, 0.2, 0.3)
UPDATES = [adapters(1, 2), adapters(2, 3), adapters(3, 1)]


def mean(layer: str) -> Array:
    found: Array = sum(w * product(one, layer) for w, one in zip(SHARE, UPDATES, strict=True))  # type: ignore[assignment]
    return found


def test_nothing_is_lost_up_to_the_rank() -> None:
    """The ranks are 2, 3 and 1, so the mean has a rank of 6."""
    found = merged(UPDATES, SHARE, adapters(0, 6))
    for layer in LAYERS:
        np.testing.assert_allclose(product(found, layer), mean(layer), atol=1e-6)
    heads = sum(w * one["head"] for w, one in zip(SHARE, UPDATES, strict=True))
    np.testing.assert_allclose(found["head"], heads, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_beyond_the_rank_the_smallest_singular_values_are_lost(rank: int) -> None:
    found = merged(UPDATES, SHARE, adapters(0, rank))
    for layer in LAYERS:
        u, sizes, v = np.linalg.svd(mean(layer).astype(np.float64))
        best = (u[:, :rank] * sizes[:rank]) @ v[:rank]
        np.testing.assert_allclose(product(found, layer), best, atol=1e-5)
        told = svd.truncate(*svd.stack(layer, list(zip(UPDATES, SHARE, strict=True))), rank).error
        lost = np.linalg.norm(mean(layer) - best) / np.linalg.norm(mean(layer))
        assert told == pytest.approx(lost, rel=1e-6)
        # Both factors are of one size.
        for row, column in zip(found[layer + A], found[layer + B].T, strict=True):
            assert np.linalg.norm(row) == pytest.approx(float(np.linalg.norm(column)), rel=1e-4)


def test_clipped_updates_count_for_the_rest_as_the_version_itself() -> None:
    base = adapters(0, 20)  # as many as the layers have inputs: nothing is cut
    found = merged(UPDATES, SHARE, base, (0.5, 1.0, 1.0))
    for layer in LAYERS:
        expected = mean(layer) + 0.25 * (product(base, layer) - product(UPDATES[0], layer))
        np.testing.assert_allclose(product(found, layer), expected, atol=1e-5)


def test_adapters_that_add_nothing_stay_so() -> None:
    nothing = Weights(
        {n: np.zeros_like(a) if n.endswith(B) else a for n, a in adapters(1, 2).items()}
    )
    found = merged([nothing], [1.0], adapters(0, 2), [1.0])
    assert not any(product(found, layer).any() for layer in LAYERS)


def test_equal_updates_are_equal_bytes_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = merged(UPDATES, SHARE, adapters(0, 4))
    monkeypatch.setattr(weights, "PIECE_BYTES", 64)
    assert weights.digest(merged(UPDATES, SHARE, adapters(0, 4))) == weights.digest(whole)
