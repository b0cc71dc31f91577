"""What a peer computes: bins of its rows, and the histograms that a version asks for. Pure.

A number z = (value - mean) / scale lies in one of 2048 slots, which are narrow near the mean and
wider away from it: slot = h + h·asinh(a·z) / asinh(a·32), a = 256. A category's slot is its index.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.tables.trees.layout import SLOTS, Array, Arrays, Numbers, Position, hessian_unit
from protocols.tables.trees.objectives import Floats, Gradients, Objective

Slots = npt.NDArray[np.int16]
Bins = npt.NDArray[np.uint8]

_HALF = SLOTS / 2 - 1
_STEEPNESS, _FARTHEST = 256.0, 32.0
_SPAN = np.arcsinh(_STEEPNESS * _FARTHEST)
#: Rows that are counted at once.
_BLOCK = 1 << 14
#: The slot of a missing value.
MISSING = -1


def slots_of(z: npt.NDArray[np.float32]) -> Slots:
    """The slots of scaled numbers, any shape; NaN is missing."""
    with np.errstate(invalid="ignore"):
        found = np.rint(_HALF + _HALF * np.arcsinh(_STEEPNESS * z.astype(np.float64)) / _SPAN)
    clipped = np.clip(np.nan_to_num(found, nan=MISSING), 0, SLOTS - 1)
    return np.where(np.isnan(z), MISSING, clipped).astype(np.int16)


def slot_values(slots: Array) -> Floats:
    """The scaled numbers in the middle of slots."""
    found: Floats = np.sinh((slots - _HALF) / _HALF * _SPAN) / _STEEPNESS
    return found


def edge_of(slot: int) -> float:
    """The scaled number between a slot and the next one."""
    return float(np.sinh((slot + 0.5 - _HALF) / _HALF * _SPAN) / _STEEPNESS)


def bins_of(slots: Slots, cuts: Array, kinds: Array) -> Bins:
    """The bin of each row and feature: uint8[n, F] of slots int16[n, F]."""
    bins = np.empty(slots.shape, np.uint8)
    for feature, (column, own) in enumerate(zip(slots.T, cuts, strict=True)):
        places = np.searchsorted(own, column)
        if kinds[feature]:
            known = own[np.minimum(places, len(own) - 1)] == column
            places = np.where(known, places + 1, 0)
        bins[:, feature] = np.where(column == MISSING, 0, places + 1)
    return bins


def step_down(version: Arrays, tree: int, output: int, level: int, bins: Bins, at: Array) -> Array:
    """The heap index of each row one level below `at` int64[n], or `at` in a leaf."""
    start = 2**level - 1
    inside = (at >= start) & (at < 2 * start + 1)
    nodes = np.where(inside, at, 0)
    features = version["feature"][tree, output].astype(np.int64)[nodes]
    bits = version["left"][tree, output][nodes]
    found = bins[np.arange(len(at)), np.maximum(features, 0)].astype(np.int64)
    below = 2 * nodes + 2 - ((bits >> found) & 1)
    return np.where(inside & (features >= 0), below, at)


def add_trees(margins: Floats, version: Arrays, trees: range, depth: int, bins: Bins) -> None:
    """Add the leaves of these trees to the margins float64[n, K], one tree after the other, so that
    a restart does not change the last digit."""
    for tree in trees:
        for output in range(margins.shape[1]):
            at = np.zeros(len(bins), np.int64)
            for level in range(depth):
                at = step_down(version, tree, output, level, bins, at)
            margins[:, output] += version["leaf"][tree, output][at]


def join_small(counts: Array, least: int) -> Array:
    """For each place of counts int[m], the place where its rows count: int64[m].

    A place with fewer rows joins the next ones until they have `least`, and the last ones join
    those before.
    """
    goes_to = np.arange(len(counts))
    first, carried, last = 0, 0, -1
    for place in np.flatnonzero(counts):
        carried += int(counts[place])
        if carried >= least:
            goes_to[first : place + 1] = last = int(place)
            first, carried = last + 1, 0
    if carried and last >= 0:
        goes_to[first:] = last
    elif carried:
        goes_to[:] = len(counts) - 1
    return goes_to


class GrowingRows:
    """A peer's rows while trees grow. `slots` int16[n, F], targets `y`. `weights` float64[n]: of
    the rows; None if all count alike.

    It keeps margins from round to round, and recomputes them if a version does not follow from the
    last one. `min_count`: the minimum rows of this peer in a node and, if the sums are not masked,
    in a bin of the whole table and in a slot.
    """

    def __init__(
        self,
        slots: Slots,
        y: npt.NDArray[np.generic],
        objective: Objective,
        min_count: int,
        weights: Floats | None = None,
    ) -> None:
        self._slots, self._y, self._objective = slots, y, objective
        self._weights = weights
        self._min_count = max(1, min_count)
        self._known: dict[str, Array] = {}
        self._trees = 0
        self._bins: Bins = np.zeros(slots.shape, np.uint8)
        self._joined_bins = self._bins
        self._margins: Floats = np.zeros((len(slots), objective.outputs))

    def sums(self, version: Arrays, at: Position, numbers: Numbers, *, masked: bool) -> Array:
        """The update int32[n] that this version asks for. Raises BadWeights.

        `masked`: with the hessians of the objective, for a secure sum.
        """
        if at.is_cutting:
            return self._slot_counts(at, 1 if masked else self._min_count)
        if not len(at.asked):
            return np.zeros(1, np.int32)
        mass = len(self._slots) if self._weights is None else float(self._weights.sum())
        if mass * self._objective.bound * 2.0**at.bits >= 2**31:
            raise BadWeights("sums of this peer's rows do not fit on the grid of the version")
        self._follow(version, at)
        found = self._gradients(masked)
        bins = self._bins if masked else self._joined_bins
        nodes = self._nodes(version, at, bins)
        made = np.zeros(at.sums, np.int64)
        with_hessians = masked or self._weights is not None
        for output in range(at.shape.outputs):
            own = np.flatnonzero(at.asked[:, 0] == output)
            one = Gradients(found.gradient[:, output], found.hessian[:, output])
            made[own] = self._histograms(bins, nodes[output], one, at, own, with_hessians)
        if not with_hessians:
            constant = numbers._replace(constant=self._objective.constant)
            made[..., 1] *= hessian_unit(at, constant)
        return made.reshape(-1).astype(np.int32)

    def _gradients(self, masked: bool) -> Gradients:
        """The gradients of all rows, times the weights. Unless `masked`, hessians are constant."""
        found = self._objective.gradients(self._margins, self._y)
        if self._weights is None:
            return found
        hessian = found.hessian if masked else np.full_like(found.hessian, self._objective.constant)
        return Gradients(found.gradient * self._weights[:, None], hessian * self._weights[:, None])

    def _slot_counts(self, at: Position, least: int) -> Array:
        counts = np.zeros(at.sums, np.int32)
        for feature, column in enumerate(self._slots.T):
            found = np.bincount(column[column >= 0], minlength=SLOTS)
            counts[feature] = np.bincount(join_small(found, least), found, SLOTS)
        return counts.reshape(-1)

    def _histograms(
        self, bins: Bins, nodes: Array, of: Gradients, at: Position, asked: Array, hessians: bool
    ) -> Array:
        """int64[m, F, B, 2]: the sums of the `asked` nodes of one output; counts of rows in place
        of hessians unless `hessians`."""
        shape, unit = (len(asked), *at.sums[1:3]), float(1 << at.bits)
        places = np.full(2 ** (at.level + 1), -1)
        places[2**at.level - 1 + at.asked[asked, 1]] = np.arange(len(asked))
        made = np.zeros((*shape, 2), np.int64)
        within = np.arange(shape[1]) * shape[2]
        rows = np.flatnonzero(places[nodes] >= 0)
        for start in range(0, len(rows), _BLOCK):
            some = rows[start : start + _BLOCK]
            keys = places[nodes[some], None] * (shape[1] * shape[2]) + within + bins[some]
            for place, values in enumerate((of.gradient, of.hessian if hessians else None)):
                told = None
                if values is not None:  # sums of whole numbers are exact as float64
                    told = np.repeat(np.rint(values[some] * unit), shape[1])
                counts = np.bincount(keys.reshape(-1), told, math.prod(shape))
                made[..., place] += counts.astype(np.int64).reshape(shape)
        return made

    def _follow(self, version: Arrays, at: Position) -> None:
        """Bring bins and margins to the trees before the one that grows."""
        same = ("cuts", "kinds")
        trees = ("feature", "left", "leaf")
        if not (
            self._known
            and self._trees <= at.tree
            and all(np.array_equal(self._known[name], version[name]) for name in same)
            and all(
                np.array_equal(self._known[name], version[name][: self._trees]) for name in trees
            )
        ):
            self._trees = 0
            self._bins = bins_of(self._slots, version["cuts"], version["kinds"])
            self._joined_bins = np.empty_like(self._bins)
            for feature, column in enumerate(self._bins.T):
                goes_to = join_small(np.bincount(column, minlength=at.shape.bins), self._min_count)
                self._joined_bins[:, feature] = goes_to[column]
            self._margins = np.full(self._margins.shape, self._objective.start)
        if self._trees < at.tree or not self._known:
            more = range(self._trees, at.tree)
            add_trees(self._margins, version, more, at.shape.depth, self._bins)
            self._trees = at.tree
            self._known = {name: version[name].copy() for name in same}
            self._known |= {name: version[name][: at.tree].copy() for name in trees}

    def _nodes(self, version: Arrays, at: Position, bins: Bins) -> list[Array]:
        """Of each output, the node of each row for the histograms of this level, heap order."""
        # From the root, as an earlier level of this tree may be another one now.
        found = []
        for output in range(at.shape.outputs):
            nodes = np.zeros(len(self._slots), np.int64)
            for level in range(at.level):
                nodes = step_down(version, at.tree, output, level, bins, nodes)
                nodes = self._join_few(nodes, level + 1)
            found.append(nodes)
        return found

    def _join_few(self, nodes: Array, level: int) -> Array:
        """The nodes, where rows of a node with few of them are in its sibling."""
        first, last = 2**level - 1, 2 ** (level + 1) - 1
        counts, goes_to = np.bincount(nodes, minlength=last), np.arange(last)
        for left in range(first, last, 2):
            few, more = sorted((left, left + 1), key=lambda node: (counts[node], node))
            if 0 < counts[few] < self._min_count:
                goes_to[few] = more
        return goes_to[nodes]
