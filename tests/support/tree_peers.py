"""Peers that grow trees in one process, without a fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.model import weights
from protocols.model.weights import Weights
from protocols.tables.trees import growth, layout
from protocols.tables.trees.histograms import GrowingRows, slots_of
from protocols.tables.trees.layout import Numbers, Shape
from protocols.tables.trees.objectives import Objective, choose

Array = npt.NDArray[Any]


class Forest(NamedTuple):
    """What a run of trees agrees on."""

    shape: Shape
    numbers: Numbers
    objective: Objective
    kinds: Array
    weights: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        features: int,
        *,
        trees: int = 3,
        depth: int = 3,
        bins: int = 16,
        objective: str = "auto",
        classes: int = 2,
        kinds: Sequence[int] = (),
        min_weight: float = 1.0,
        mean: float = 0.0,
        scale: float = 1.0,
        weights: Sequence[float] = (),
        weight_sum: float = 0.0,
    ) -> Forest:
        chosen = choose(objective, classes, mean, scale)
        shape = Shape(trees, chosen.outputs, depth, features, bins)
        heaviest = max(weights, default=0.0)
        numbers = Numbers(
            *(0.3, 1.0, min_weight, 0.0),
            *(chosen.constant, chosen.bound * (heaviest or 1), chosen.max_step),
            *(heaviest, weight_sum),
        )
        kinds = kinds or [0] * features
        return cls(shape, numbers, chosen, np.array(kinds, np.uint8), tuple(weights))

    def first(self) -> dict[str, Array]:
        return layout.first(self.shape, self.numbers, self.kinds)

    def rows(self, z: Array, y: Array, min_count: int = 1) -> GrowingRows:
        weights = np.array(self.weights)[y] if self.weights else None
        slots = slots_of(z.astype(np.float32))
        return GrowingRows(slots, y, self.objective, min_count, weights)


def name_cohort(number: int, peers: int) -> bytes:
    return hashlib.sha256(f"{peers}".encode()).digest()


def grow(
    forest: Forest,
    peers: Sequence[GrowingRows],
    counts: Sequence[int],
    *,
    masked: bool = False,
    rounds: int | None = None,
    cohort: Callable[[int, int], bytes] = name_cohort,
    on_round: Callable[[Mapping[str, Array], list[Array]], None] = lambda version, sums: None,
) -> dict[str, Array]:
    """The version after all rounds, or after this number of rounds."""
    version, state = forest.first(), dict[str, Array]()
    whole = 1 + forest.shape.trees * forest.shape.depth
    for number in range(whole if rounds is None else rounds):
        at, numbers = layout.read(version, forest.shape)
        sums = [peer.sums(version, at, numbers, masked=masked) for peer in peers]
        for one, rows in zip(sums, counts, strict=True):
            assert layout.check_sums(one, at, numbers, rows, masked=masked) == ""
        on_round(version, sums)
        total = np.sum([one.astype(np.int64) for one in sums], 0)
        named = cohort(number, len(peers))
        version, state = growth.grow(version, (at, numbers), state, total, sum(counts), named)
    return version


def digest(version: Mapping[str, Array]) -> str:
    return weights.digest(Weights(version))
