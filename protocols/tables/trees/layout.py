"""The tensors of a version with trees, of the update that it asks for, and their checks. Pure.

T trees of each of K outputs, depth D, F features, B bins:

    at       I32[3]               the tree that grows, its level (-1: the cuts are next), bits
    numbers  F64[9]               see `Numbers`
    kinds    U8[F]                1 for a category
    cuts     I16[F, B - 2]        slots (`histograms`): the last of a bin, or categories with a bin
    asked    I16[K, 2^(D-2)]      nodes of the level whose histograms are asked for; -1: no more
    feature  I16[T, K, 2^D - 1]   of each inner node, in heap order; -1: none, a leaf
    left     I64[T, K, 2^D - 1]   bit b is set: bin b goes left
    leaf     F32[T, K, 2^(D+1) - 1]   what a row in the node adds to its margin
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

#: The fine grid from which the cuts come.
SLOTS = 2048
MAX_TREES, MAX_DEPTH, MIN_BINS, MAX_BINS, MAX_OUTPUTS = 5000, 10, 4, 63, 100
MAX_BITS = 24
#: Bits of a sum of all peers: one more is the sign.
_SUM_BITS = 30
#: Elements of the trees of one version: 1 GB of leaves.
_MAX_NODES = 1 << 28
#: The name of the only tensor of an update.
SUMS = "sums"


class Numbers(NamedTuple):
    """The settings of growing, as XGBoost has them.

    `eta`: shrinks each tree. `l2`: λ. `min_weight`: least sum of hessians of a node. `min_gain`: γ.
    `constant`: the hessian of each row where none is sent. `bound`: the largest gradient of a row.
    `max_step`: the largest leaf before `eta` (0: any). `heaviest`: the largest weight of a row, by
    which its gradient and hessian are multiplied; 0 if rows have no weights. `weight_sum`: a bound
    on the sum of all weights; 0 if it is not known.
    """

    eta: float
    l2: float
    min_weight: float
    min_gain: float
    constant: float
    bound: float
    max_step: float
    heaviest: float = 0.0
    weight_sum: float = 0.0

    def bits(self, rows: int) -> int:
        """Of the finest grid on which the gradients of these rows can be added up."""
        if not (self.heaviest and self.weight_sum):
            return grid_bits(rows, self.bound)
        return grid_bits(max(rows, self.weight_sum), self.bound / self.heaviest)


class Shape(NamedTuple):
    """The sizes of a version."""

    trees: int
    outputs: int
    depth: int
    features: int
    bins: int

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each tensor. Raises BadWeights for sizes beyond the limits."""
        trees, outputs, depth, features, bins = self
        inner = (trees, outputs, 2**depth - 1)
        if not (
            1 <= trees <= MAX_TREES
            and 1 <= outputs <= MAX_OUTPUTS
            and 1 <= depth <= MAX_DEPTH
            and features >= 1
            and MIN_BINS <= bins <= MAX_BINS
            and math.prod(inner) <= _MAX_NODES
        ):
            raise BadWeights(f"no trees have these sizes: {self}")
        return {
            "at": ("I32", (3,)),
            "numbers": ("F64", (len(Numbers._fields),)),
            "kinds": ("U8", (features,)),
            "cuts": ("I16", (features, bins - 2)),
            "asked": ("I16", (outputs, max(1, 2 ** (depth - 2) if depth > 1 else 1))),
            "feature": ("I16", inner),
            "left": ("I64", inner),
            "leaf": ("F32", (trees, outputs, 2 ** (depth + 1) - 1)),
        }

    @classmethod
    def of(cls, schema: Mapping[str, tuple[str, tuple[int, ...]]]) -> Self:
        """The sizes of a version with these tensors. Raises BadWeights for one without trees."""
        try:
            trees, outputs, inner = schema["feature"][1]
            features, cuts = schema["cuts"][1]
        except (KeyError, ValueError) as err:
            raise BadWeights("the version has no trees") from err
        found = cls(trees, outputs, (inner + 1).bit_length() - 1, features, cuts + 2)
        if found.tensors() != {name: tuple(spec) for name, spec in schema.items()}:
            raise BadWeights("the tensors of the version are not those of trees")
        return found

    def max_sums(self) -> int:
        """The most elements of an update."""
        asked = self.outputs * max(1, 2 ** (self.depth - 2) if self.depth > 1 else 1)
        return self.features * max(SLOTS, asked * self.bins * 2)


def first(shape: Shape, numbers: Numbers, kinds: Array) -> dict[str, Array]:
    """The version before the cuts. `kinds`: bool[F], true for a category."""
    dtypes = {"I32": "<i4", "F64": "<f8", "U8": "u1", "I16": "<i2", "I64": "<i8", "F32": "<f4"}
    made = {n: np.zeros(size, dtypes[code]) for n, (code, size) in shape.tensors().items()}
    made["at"][1] = -1
    made["numbers"][:] = numbers
    made["kinds"][:] = kinds
    made["cuts"][:] = SLOTS
    made["asked"][:] = made["feature"][:] = -1
    return made


class Position(NamedTuple):
    """Where a version stands. `asked`: pairs of output and node of the level; `nodes` of them have
    histograms in the next update."""

    shape: Shape
    tree: int
    level: int
    bits: int
    asked: Array

    @property
    def is_cutting(self) -> bool:
        """The cuts are next."""
        return self.level < 0

    @property
    def sums(self) -> tuple[int, ...]:
        """The shape of the next update; one number if nothing is asked for."""
        if self.is_cutting:
            return (self.shape.features, SLOTS)
        nodes = len(self.asked)
        return (nodes, self.shape.features, self.shape.bins, 2) if nodes else (1,)


def read(version: Arrays, shape: Shape) -> tuple[Position, Numbers]:
    """Where a version stands, and its numbers. Raises BadWeights for one that cannot be.

    Both sides check: an agent does not trust a version, nor does the coordinator the first one.
    """
    tree, level, bits = (int(n) for n in version["at"])
    numbers = Numbers(*(float(n) for n in version["numbers"]))
    asked = np.argwhere(version["asked"] >= 0)
    nodes = version["asked"][version["asked"] >= 0].astype(np.int64)
    pairs = np.stack([asked[:, 0], nodes], 1) if len(asked) else np.zeros((0, 2), np.int64)
    inner = 2**shape.depth - 1
    features, cuts, kinds = version["feature"], version["cuts"], version["kinds"]
    is_done = tree >= shape.trees
    sound = (
        tree >= 0
        and -1 <= level < (1 << 30 if is_done else shape.depth)
        and (level >= 0 or tree == 0)
        and 0 <= bits <= MAX_BITS
        and all(math.isfinite(n) and n >= 0 for n in numbers)
        and 0 < numbers.eta <= 1
        and 0 < numbers.constant <= 1e6
        and 0 < numbers.bound <= 1e9
        and numbers.heaviest <= 1e9
        and (not len(pairs) or (not is_done and level >= 0 and int(nodes.max()) < 2**level))
        and len({(k, n >> 1) for k, n in pairs.tolist()}) == len(pairs)
        and int(features.min(initial=-1)) >= -1
        and int(features.max(initial=-1)) < shape.features
        and features.shape[-1] == inner
        and bool(((cuts >= 0) & (cuts <= SLOTS)).all())
        and bool((kinds <= 1).all())
        and bool(np.isfinite(version["leaf"]).all())
    )
    if not sound:
        raise BadWeights("the version is not a state that growing trees can have")
    return Position(shape, tree, level, bits, pairs), numbers


def grid_bits(rows: float, bound: float) -> int:
    """The finest grid on which the gradients of these rows, each at most `bound`, add up to less
    than 2^30: multiples of 2^-bits."""
    return max(0, min(MAX_BITS, _SUM_BITS - math.ceil(math.log2(max(1.0, rows * bound)))))


def check_sums(sums: Array, at: Position, numbers: Numbers, rows: int, *, masked: bool) -> str:
    """What is wrong with the sums int[n] of an update, or of all; empty if nothing.

    `rows`: those of the peer, or of all. `masked`: the hessians are not constant.
    """
    sums = sums.astype(np.int64).reshape(at.sums)
    if sums.ndim == 1:
        return "numbers where nothing is asked" if sums.any() else ""
    if at.is_cutting:
        if int(sums.min()) < 0:
            return "a negative count"
        if int(sums.sum(1).max()) > rows:
            return f"counts of {int(sums.sum(1).max())} rows, and there are {rows}"
        return ""
    gradients, hessians = sums[..., 0], sums[..., 1]
    most = round(numbers.bound * (1 << at.bits))
    if numbers.heaviest:
        return _check_weighted(sums, at, numbers, rows, masked=masked)
    step = 1 if masked else hessian_unit(at, numbers)
    totals = sums.sum(2)
    if int(hessians.min()) < 0:
        return "a negative count"
    if (hessians % step).any():
        return "a count that is not whole"
    if (totals != totals[:, :1]).any():
        return "features that disagree about the sum of a node"
    counts = np.full_like(hessians, rows) if masked else hessians // step
    for output in range(at.shape.outputs):
        total = int(totals[at.asked[:, 0] == output, 0, 1].sum())
        if total > rows * (most if masked else step):
            return f"counts of {total // step} rows, and there are {rows}"
    return (
        "a sum of gradients that is too large" if (np.abs(gradients) > counts * most).any() else ""
    )


def _check_weighted(sums: Array, at: Position, numbers: Numbers, rows: int, *, masked: bool) -> str:
    """As `check_sums`, for rows with weights, whose hessians are not counts even if constant."""
    gradients, hessians = sums[..., 0], sums[..., 1]
    unit = float(1 << at.bits)
    natural, most = numbers.bound / numbers.heaviest, numbers.bound * unit
    totals = sums.sum(2)
    if int(hessians.min()) < 0:
        return "a negative sum of weights"
    if (totals != totals[:, :1]).any():
        return "features that disagree about the sum of a node"
    heaviest = most if masked else numbers.constant * numbers.heaviest * unit + 1
    for output in range(at.shape.outputs):
        total = int(totals[at.asked[:, 0] == output, 0, 1].sum())
        if total > rows * heaviest:
            return f"weights of more than the {rows} rows that there are"
    limit = np.full(hessians.shape, rows * most)
    if not masked:  # of each row, up to the rounding of both
        limit = hessians * (natural / numbers.constant) + rows * (1 + natural / numbers.constant)
    return "a sum of gradients that is too large" if (np.abs(gradients) > limit).any() else ""


def hessian_unit(at: Position, numbers: Numbers) -> int:
    """The constant hessian of a row on the grid."""
    return max(1, round(numbers.constant * (1 << at.bits)))
