"""Trees from summed histograms: one peer with all rows, or many with parts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protocols.errors import BadWeights, UsageError
from protocols.tables.trees import growth, layout
from protocols.tables.trees.histograms import add_trees, bins_of, edge_of, slots_of
from protocols.tables.trees.layout import SLOTS
from protocols.tables.trees.objectives import choose
from tests.support.tree_peers import Array, Forest, digest, grow

ROWS = 400


def table(seed: int = 0, rows: int = ROWS) -> tuple[Array, Array]:
    """Four columns, one with gaps and one with few values; the class depends on three of them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, 4))
    z[:, 3] = rng.integers(0, 3, rows)
    score = z[:, 0] * (z[:, 3] - 1) + 0.5 * z[:, 1] ** 2 + 0.3 * rng.normal(size=rows)
    z[rng.random(rows) < 0.2, 1] = np.nan
    return z, (score > 0.3).astype(np.int64)


def parts(rows: int, ends: Sequence[int], seed: int) -> list[npt.NDArray[np.intp]]:
    return np.split(np.random.default_rng(seed).permutation(rows), ends)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classes": 3},
        {"classes": 0, "objective": "squared"},
        {"classes": 0, "objective": "poisson", "mean": 1.3, "scale": 2.0},
        {"kinds": (0, 0, 0, 1)},
        {"weights": (0.531, 2.62), "weight_sum": 1024.0},
        {"classes": 3, "weights": (0.4, 3.1, 7.7)},
    ],
)
def test_many_peers_give_the_digest_of_one_with_all_rows(
    masked: bool, options: dict[str, Any]
) -> None:
    z, y = table()
    if options.get("classes") == 3:
        y = y + (z[:, 0] > 1)
    if options.get("classes") == 0:
        y = (z[:, [0]] + y[:, None]).astype(np.float32)
    forest = Forest.of(4, **options)
    whole = grow(forest, [forest.rows(z, y)], [ROWS], masked=masked)
    for seed, ends in ((1, (50, 130)), (2, (5, 6, 300, 399))):
        places = parts(ROWS, ends, seed)
        peers = [forest.rows(z[at], y[at]) for at in places]
        counts = [len(at) for at in places]
        assert digest(grow(forest, peers, counts, masked=masked)) == digest(whole)
    assert (whole["feature"][:, :, 0] >= 0).all()


def test_trees_learn() -> None:
    z, y = table(rows=2000)
    forest = Forest.of(4, trees=20, depth=4, bins=32)
    for masked in (False, True):
        version = grow(forest, [forest.rows(z[:1500], y[:1500])], [1500], masked=masked)
        margins = margins_of(forest, version, z[1500:])
        assert ((margins[:, 0] > 0) == y[1500:]).mean() > 0.8


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_of_a_class_with_a_weight_counts_as_that_many_rows(masked: bool) -> None:
    """Trees with weights 1 and 3 are those of a table in which each row of class 1 is there three
    times."""
    z, y = table()
    thrice = np.repeat(np.arange(ROWS), np.where(y == 1, 3, 1))
    options: dict[str, Any] = {"trees": 5, "weight_sum": 1024.0}
    weighted = Forest.of(4, weights=(1.0, 3.0), **options)
    plain = Forest.of(4, weights=(1.0, 1.0), **options)
    # The cuts are quantiles of rows, so both have the same ones.
    version = {**plain.first(), "numbers": weighted.first()["numbers"]}
    cut = grow(weighted, [weighted.rows(z, y)], [ROWS], masked=masked, rounds=1)
    for name in ("cuts", "at", "asked"):
        version[name] = cut[name]
    found = []
    for forest, of_z, of_y in ((weighted, z, y), (plain, z[thrice], y[thrice])):
        rows, state, now = forest.rows(of_z, of_y), dict[str, Array](), version
        for _ in range(5 * 3):
            at, numbers = layout.read(now, forest.shape)
            sums = rows.sums(now, at, numbers, masked=masked)
            assert layout.check_sums(sums, at, numbers, len(of_y), masked=masked) == ""
            place = at, numbers
            now, state = growth.grow(now, place, state, sums, len(of_y), bytes(32))
        found.append(now)
    assert (found[0]["feature"] == found[1]["feature"]).all()
    np.testing.assert_allclose(found[0]["leaf"], found[1]["leaf"], atol=1e-3)


@pytest.mark.attack("5")
def test_crafted_sums_of_rows_with_weights_are_refused() -> None:
    """Attack: send more weight, or steeper gradients, than the rows of a peer can have."""
    z, y = table()
    forest = Forest.of(4, weights=(0.5, 4.0), weight_sum=1024.0)
    rows = forest.rows(z, y)
    version = grow(forest, [rows], [ROWS], rounds=1)
    at, numbers = layout.read(version, forest.shape)
    for masked in (False, True):
        sums = rows.sums(version, at, numbers, masked=masked).reshape(at.sums)
        assert layout.check_sums(sums, at, numbers, ROWS, masked=masked) == ""
        for place, factor, words in (
            (1, -1, "negative"),
            (1, 500, "weights of more"),
            (0, 2000, ""),
        ):
            lie = sums.copy().astype(np.int64)
            lie[..., place] *= factor
            found = layout.check_sums(lie, at, numbers, ROWS, masked=masked)
            assert (words or "too large") in found
        lie = sums.copy()
        lie[0, 1, 3, 1] += 5
        assert "disagree" in layout.check_sums(lie, at, numbers, ROWS, masked=masked)


def margins_of(forest: Forest, version: Mapping[str, Array], z: Array) -> Array:
    bins = bins_of(slots_of(z.astype(np.float32)), version["cuts"], version["kinds"])
    margins = np.full((len(z), forest.shape.outputs), forest.objective.start)
    add_trees(margins, version, range(forest.shape.trees), forest.shape.depth, bins)
    return margins


def test_a_restart_changes_nothing() -> None:
    """A peer that computes its margins anew has the same last digit."""
    z, y = table()
    forest, fresh = Forest.of(4, trees=6), []

    def again(version: Mapping[str, Array], sums: list[Array]) -> None:
        at, numbers = layout.read(version, forest.shape)
        fresh.append(
            np.array_equal(forest.rows(z, y).sums(version, at, numbers, masked=True), sums[0])
        )

    grow(forest, [forest.rows(z, y)], [ROWS], masked=True, on_round=again)
    assert fresh == [True] * len(fresh)
    assert len(fresh) == 1 + 6 * 3


def test_a_tree_ends_where_the_peers_change_and_the_next_one_grows() -> None:
    z, y = table()
    forest = Forest.of(4, trees=2)
    peers = [forest.rows(z[at], y[at]) for at in parts(ROWS, (200,), 0)]

    def changed(number: int, peers: int) -> bytes:
        return bytes(32) if number < 2 else bytes([1]) * 32

    version = grow(forest, peers, [200, 200], cohort=changed)
    assert (version["feature"][0, 0, 1:] == -1).all()
    assert version["feature"][0, 0, 0] >= 0
    assert (version["leaf"][0, 0, 1:3] != 0).all()
    assert (version["feature"][1, 0, 1:3] >= 0).any()
    assert version["at"].tolist()[:2] == [2, 0]


def test_an_update_has_half_of_the_nodes_of_a_level() -> None:
    z, y = table(rows=2000)
    forest, sizes = Forest.of(4, trees=1, depth=5, bins=32, min_weight=0.1), []
    grow(
        forest,
        [forest.rows(z, y)],
        [2000],
        on_round=lambda version, sums: sizes.append(sums[0].size),
    )
    node = 4 * 32 * 2
    assert sizes[0] == 4 * SLOTS
    assert sizes[1:3] == [node, node]
    assert all(size <= node * 2 ** (level - 1) for level, size in enumerate(sizes[2:], 1))


def test_the_bytes_of_a_large_run_are_below_50_mb() -> None:
    """100 trees of depth 6, 50 features, 32 bins, one output."""
    shape = Forest.of(50, trees=100, depth=6, bins=32).shape
    levels = [1, *(2 ** (level - 1) for level in range(1, shape.depth))]
    numbers = shape.features * SLOTS + shape.trees * sum(levels) * 50 * 32 * 2
    assert shape.max_sums() == max(50 * SLOTS, 16 * 50 * 32 * 2)
    assert 4 * numbers < 50e6


# --- bins and cuts --------------------------------------------------------------------------------


def test_slots_keep_the_order_and_edges_lie_between_them() -> None:
    z = np.sort(np.random.default_rng(0).standard_cauchy(1000)).astype(np.float32)
    slots = slots_of(z)
    assert (np.diff(slots) >= 0).all()
    assert slots_of(np.array([np.nan, -np.inf, np.inf, 0], np.float32)).tolist() == [
        -1, 0, SLOTS - 1, 1023,
    ]  # fmt: skip
    for slot in (0, 500, 1023, 1024, 2000):
        below, above = np.nextafter(np.float32(edge_of(slot)), np.float32([-99, 99]))
        assert slots_of(np.array([below * 0.99999 if below > 0 else below * 1.00001])) <= slot
        assert slots_of(np.array([above * 1.00001 if above > 0 else above * 0.99999])) > slot


def test_cuts_divide_rows_and_values_and_categories_are_the_most_frequent() -> None:
    counts = np.zeros((3, SLOTS), np.int64)
    counts[0, 100:1100] = 1
    counts[1, [7, 9, 30]] = 5, 1, 2
    counts[2, 2:20] = np.arange(18, 0, -1)
    cuts = growth.make_cuts(counts, np.array([0, 0, 1]), 8)
    bins = np.searchsorted(cuts[0], np.arange(100, 1100))
    assert np.bincount(bins).max() <= 2 * 1000 / 7 + 1  # half of the cuts are quantiles
    # Slots far from the mean are wider. Quantiles would put these rows into one bin.
    assert len(np.unique(bins[: 1000 // 7])) >= 3
    assert cuts[1].tolist() == [8, 19] + [SLOTS] * 4
    assert cuts[2].tolist() == [2, 3, 4, 5, 6, 7]
    slots = np.array([[50, 7, 2], [-1, 9, 1], [1099, 30, 7], [600, -1, 8]], np.int16)
    assert bins_of(slots, cuts, np.array([0, 0, 1])).tolist() == [
        [1, 1, 2], [0, 2, 1], [7, 3, 7], [6, 0, 1],
    ]  # fmt: skip


def test_missing_values_go_where_they_gain() -> None:
    rng = np.random.default_rng(3)
    z, y = rng.normal(size=(300, 1)), rng.integers(0, 2, 300)
    z[y == 1, 0] = np.where(rng.random((y == 1).sum()) < 0.7, np.nan, 3.0)
    forest = Forest.of(1, trees=1, depth=1)
    version = grow(forest, [forest.rows(z, y)], [300])
    margins = margins_of(forest, version, np.array([[np.nan], [3.0], [-1.0]]))[:, 0]
    assert margins[0] == margins[1] > 0 > margins[2]


# --- what is refused ------------------------------------------------------------------------------


def test_objectives_fit_targets() -> None:
    assert choose("auto", 3, 0, 1).outputs == 3
    for name, classes in (("logistic", 3), ("squared", 2), ("multiclass", 0), ("poisson", 0)):
        with pytest.raises(UsageError, match="objective"):
            choose(name, classes, -1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("at", 0, -1), ("at", 1, 3), ("at", 2, 99), ("numbers", 0, np.nan), ("numbers", 5, 0.0),
        ("asked", (0, 0), 9), ("feature", (0, 0, 0), 4), ("cuts", (0, 0), -1), ("kinds", 0, 7),
        ("leaf", (0, 0, 0), np.inf),
    ],
)  # fmt: skip
def test_a_version_that_cannot_be_is_refused(name: str, place: Any, value: float) -> None:
    forest = Forest.of(4)
    z, y = table()
    version = grow(forest, [forest.rows(z, y)], [ROWS], rounds=2)
    layout.read(version, forest.shape)
    version[name] = version[name].copy()
    version[name][place] = value
    with pytest.raises(BadWeights, match="not a state"):
        layout.read(version, forest.shape)
