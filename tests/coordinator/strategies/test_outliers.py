"""The products of changes, from which distances between updates follow."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.strategies import outliers
from protocols.model.weights import Weights


@pytest.mark.parametrize("largest", [0.01, 1e18, 3e38])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_are_those_of_the_scaled_changes(
    monkeypatch: pytest.MonkeyPatch, largest: float, dtype: type
) -> None:
    monkeypatch.setattr(outliers, "_BLOCK_VALUES", 300)
    draws = np.random.default_rng(1)
    base = draws.standard_normal(1000).astype(dtype)
    changes = draws.uniform(-largest, largest, (3, 1000)).astype(dtype)
    updates = [(base + change).astype(dtype) for change in changes]
    scale = [1.0, 0.5, 2.0]
    exact = np.array(
        [(u.astype(float) - base.astype(float)) * by for u, by in zip(updates, scale, strict=True)]
    )
    found = outliers.products(
        [Weights({"w": update}) for update in updates], scale, Weights({"w": base}), ["w"]
    )
    error = np.abs(found - exact @ exact.T).max() / np.diag(found).max()
    assert error < 1e-6


@pytest.mark.parametrize("count", [2, 5, 64, 65])
def test_products_in_pieces_are_those_of_the_whole_matrix(count: int) -> None:
    rows = np.random.default_rng(1).standard_normal((count, 7001))
    updates = [Weights({"w": row}) for row in rows]
    found = outliers.products(updates, [1.0] * count, Weights({"w": np.zeros(7001)}), ["w"])
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-9, atol=1e-9)


def test_a_difference_of_the_largest_numbers_has_products() -> None:
    most = np.finfo(np.float64).max
    one, other = Weights({"w": np.array([most])}), Weights({"w": np.array([-most])})
    assert outliers.products([one], [1e-300], other, ["w"]) == pytest.approx((2e-300 * most) ** 2)
