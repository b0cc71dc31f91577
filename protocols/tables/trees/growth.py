"""Grows trees: the version that follows from a version and the sums of all peers. Pure.

`grow` depends on its arguments alone. Ties are decided by the order of features, then of options,
and each sum of integers is exact, so the result is the same on each machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.tables.trees.histograms import slot_values
from protocols.tables.trees.layout import SLOTS, Array, Arrays, Numbers, Position

#: A sum of hessians is taken as at least this before something is divided by it.
_TINY = 1e-12


class Grown(NamedTuple):
    """The next version, and the state for the round after it.

    `state`: "parents" I64[K, 2^level, F, B, 2], the histograms of the nodes that were split, and
    "cohort" U8[32], the peers whose sums they are; empty if the next level needs none.
    """

    version: dict[str, Array]
    state: dict[str, Array]


def grow(
    version: Arrays,
    place: tuple[Position, Numbers],
    state: Mapping[str, Array],
    sums: Array,
    rows: int,
    cohort: bytes,
) -> Grown:
    """The version after `version`, whose tree and level are `place` (`layout.read`).

    `sums`: int[n], those of all peers. `rows`: how many rows these have. `cohort`: 32 bytes that
    name the set of peers. If it differs from that of `state`, the tree gets no further level.
    """
    (at, numbers), new = place, {name: np.array(array) for name, array in version.items()}
    shape, kept = at.shape, dict[str, Array]()
    new["asked"][:] = -1
    if at.tree >= shape.trees:
        new["at"][1] += 1
        return Grown(new, {})
    level, totals = at.level, sums.astype(np.int64).reshape(at.sums)
    if at.is_cutting:
        new["cuts"][:] = make_cuts(totals, version["kinds"], shape.bins)
    elif len(at.asked):
        found = _with_siblings(at, state, totals, cohort)
        if found is not None:
            kept = _split_level(new, at, numbers, *found)
            kept["cohort"] = np.frombuffer(cohort, np.uint8)
    if level + 1 < shape.depth and level >= 0:
        new["at"][1] = level + 1
        return Grown(new, kept if (new["asked"] >= 0).any() else {})
    new["at"][:] = (at.tree + (level >= 0), 0, numbers.bits(rows))
    new["asked"][:, 0] = 0 if new["at"][0] < shape.trees else -1
    return Grown(new, {})


def make_cuts(counts: Array, kinds: Array, bins: int) -> npt.NDArray[np.int16]:
    """The cuts int16[F, B - 2] of counts int64[F, SLOTS]: those of numbers, and the most frequent
    categories."""
    cuts = np.full((len(counts), bins - 2), SLOTS, np.int16)
    for own, count, is_category in zip(cuts, counts, kinds, strict=True):
        there = np.flatnonzero(count)
        if is_category:
            there = there[there > 1]  # slot 1 is for unseen and rare categories
            if len(there) > bins - 2:
                there = np.sort(there[np.argsort(-count[there], kind="stable")[: bins - 2]])
            chosen = there
        else:
            chosen = _number_cuts(there, count[there], bins)
        own[: len(chosen)] = chosen
    return cuts


def _number_cuts(slots: Array, rows: Array, bins: int) -> Array:
    """At most `bins` - 2 cuts between the `slots` that have `rows`.

    Half of them are quantiles. The other half has a density of rows^(1/3) by value, with which the
    values in a bin differ least (Panter and Dite 1951). Quantiles alone would put the whole tail of
    a skewed column, such as incomes, into one bin.
    """
    between: Array = (slots[:-1] + slots[1:]) // 2
    if len(slots) <= bins - 1:
        return between
    values = slot_values(slots)
    ends = values[:1], (values[1:] + values[:-1]) / 2, values[-1:]
    widths = np.diff(np.concatenate(ends))
    spread = np.cbrt(rows * widths**2)
    ranks = np.cumsum(rows / rows.sum() + spread / spread.sum())
    before = np.unique(np.searchsorted(ranks, ranks[-1] * np.arange(1, bins - 1) / (bins - 1)))
    chosen: Array = between[before[before < len(between)]]
    return chosen


def _with_siblings(
    at: Position, state: Mapping[str, Array], totals: Array, cohort: bytes
) -> tuple[Array, Array] | None:
    """Pairs of output and node int64[m, 2], and their histograms int64[m, F, B, 2], for the nodes
    that were asked for and their siblings. None if other peers made the parents' sums."""
    if at.level == 0:
        return at.asked, totals
    parents = state.get("parents")
    shape = at.shape
    size = (shape.outputs, 2 ** (at.level - 1), shape.features, shape.bins, 2)
    same = parents is not None and parents.shape == size
    if not same or parents is None or state["cohort"].tobytes() != cohort:
        return None
    outputs, nodes = at.asked.T
    siblings = parents[outputs, nodes >> 1] - totals
    return (
        np.concatenate([at.asked, np.stack([outputs, nodes ^ 1], 1)]),
        np.concatenate([totals, siblings]),
    )


def _split_level(
    new: dict[str, Array], at: Position, numbers: Numbers, pairs: Array, sums: Array
) -> dict[str, Array]:
    """Split those of the nodes `pairs` whose split gains enough, and ask for the smaller children.
    Returns the histograms of the nodes that were split."""
    shape, first = at.shape, 2**at.level - 1
    best = best_splits(sums, new["kinds"], numbers, at.bits)
    parents = np.zeros((shape.outputs, 2**at.level, *sums.shape[1:]), np.int64)
    smaller: list[tuple[int, int]] = []
    for i in np.lexsort((pairs[:, 1], pairs[:, 0])):
        (output, node), tree = pairs[i].tolist(), at.tree
        if at.level == 0:
            new["leaf"][tree, output, 0] = best.leaf[i]
        if not best.splits[i]:
            continue
        heap = first + node
        new["feature"][tree, output, heap] = best.feature[i]
        new["left"][tree, output, heap] = best.left[i]
        new["leaf"][tree, output, 2 * heap + 1 : 2 * heap + 3] = best.leaves[i]
        parents[output, node] = sums[i]
        smaller.append((output, 2 * node + int(best.right_is_smaller[i])))
    if at.level + 1 < shape.depth:
        counts = [0] * shape.outputs
        for output, node in smaller:
            new["asked"][output, counts[output]] = node
            counts[output] += 1
    return {"parents": parents}


class Splits(NamedTuple):
    """The best split of each of m nodes: whether it gains enough, its feature and bins to the left
    (bits), and the leaves that follow: float32[m, 2] with it, float32[m] without."""

    splits: npt.NDArray[np.bool_]
    feature: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    leaves: npt.NDArray[np.float32]
    leaf: npt.NDArray[np.float32]
    right_is_smaller: npt.NDArray[np.bool_]


def best_splits(sums: Array, kinds: Array, numbers: Numbers, bits: int) -> Splits:
    """The split of each node with the largest gain (arXiv 1603.02754, equation 7).

    `sums`: int64[m, F, B, 2], on the grid of 2^-bits. A number has an option for each cut, with
    missing values to the left and to the right. Categories are sorted by gradient over hessian, and
    each prefix of that order is an option (Fisher 1958).
    """
    count, features, bins, _ = sums.shape
    unit, l2 = float(1 << bits), numbers.l2
    total = sums[:, 0].sum(1)
    # The options of a feature: numbers of bins to the left, with missing ones and then without.
    order = np.broadcast_to(np.arange(bins), (count, features, bins)).copy()
    if kinds.any():
        gradient, hessian = (sums[..., i] / unit for i in (0, 1))
        ratio = gradient / np.maximum(hessian + l2, _TINY)
        by_ratio = np.argsort(ratio, axis=2, kind="stable")
        order[:, kinds == 1] = by_ratio[:, kinds == 1]
    placed = np.take_along_axis(sums, order[..., None], 2)
    with_missing = np.cumsum(placed, 2)[:, :, :-1]
    without = np.cumsum(placed[:, :, 1:], 2)
    left = np.concatenate([with_missing, without], 2)
    right = total[:, None, None] - left
    (gl, hl), (gr, hr) = ((side[..., 0] / unit, side[..., 1] / unit) for side in (left, right))
    g, h = total[:, 0] / unit, total[:, 1] / unit
    least = max(numbers.min_weight, _TINY)

    def score(gradient: Array, hessian: Array) -> Array:
        return gradient * gradient / np.maximum(hessian + l2, _TINY)

    gain = score(gl, hl) + score(gr, hr) - score(g, h)[:, None, None]
    allowed = (hl >= least) & (hr >= least)
    # Of categories, a missing value is one like the others; of numbers, option 0 is bin 0 alone,
    # which is the last option of the other kind, too.
    allowed[:, kinds == 1, bins - 1 :] = False
    allowed[:, kinds == 0, 0] = False
    gain = np.where(allowed, gain, -1.0).reshape(count, -1)
    best = gain.argmax(1)
    nodes = np.arange(count)
    feature, option = best // (2 * (bins - 1)), best % (2 * (bins - 1))
    leaves_out_missing = option >= bins - 1
    last = np.where(leaves_out_missing, option - bins + 2, option)
    places = np.arange(bins)
    inside = (places >= leaves_out_missing[:, None]) & (places <= last[:, None])
    masks = (np.int64(1) << order[nodes, feature].astype(np.int64)) * inside
    left_g, left_h, right_g, right_h = (side[nodes, feature, option] for side in (gl, hl, gr, hr))
    leaves = [_leaf(left_g, left_h, numbers), _leaf(right_g, right_h, numbers)]
    return Splits(
        splits=gain[nodes, best] > max(numbers.min_gain, 1e-6),
        feature=feature,
        left=masks.sum(1),
        leaves=np.stack(leaves, 1),
        leaf=_leaf(g, h, numbers),
        right_is_smaller=right_h < left_h,
    )


def _leaf(gradient: Array, hessian: Array, numbers: Numbers) -> npt.NDArray[np.float32]:
    """What a leaf adds to a margin, float32[m]."""
    step = -gradient / np.maximum(hessian + numbers.l2, _TINY)
    if numbers.max_step:
        step = np.clip(step, -numbers.max_step, numbers.max_step)
    return np.where(hessian > _TINY, numbers.eta * step, 0.0).astype(np.float32)
