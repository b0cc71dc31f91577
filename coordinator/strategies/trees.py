"""Gradient-boosted trees: the sums of a round become the next level (`protocols.tables.trees`).

Chen and Guestrin 2016, arXiv 1603.02754. A run has this strategy with `--set model=trees`, and no
other run has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coordinator.storage.run_spec import RunSpec
from coordinator.strategies.adapter import StrategyAdapter
from protocols.codecs import registry, sums
from protocols.errors import UsageError
from protocols.model.weights import WeightReader
from protocols.tables.trees import growth
from protocols.tables.trees.growth import Grown

NAME = "trees"


class Trees(StrategyAdapter):
    """The adapter. Flower's FedAvg samples the peers; `feed` "sums" needs no `aggregate_train`."""

    feed = "sums"
    weighs_peers = False

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError unless the run grows trees."""
        if spec.task != "tabular" or spec.settings.get("model") != NAME:
            raise UsageError(
                "the strategy trees is for tables whose model is trees", "--set model=trees"
            )
        if spec.codec != registry.SUMS:
            raise UsageError("updates of trees are sums, which no --codec can compress")
        super().check(spec)


def grow(
    version: WeightReader,
    state: Mapping[str, Any],
    updates: Sequence[WeightReader],
    rows: int,
    cohort: bytes,
) -> Grown:
    """The version after `version` (`growth.grow`). Raises BadWeights."""
    arrays, at, numbers = sums.read_version(version)
    total = np.zeros(math.prod(at.sums), np.int64)
    for update in updates:
        total += sums.read(update)
    return growth.grow(arrays, (at, numbers), state, total, rows, cohort)
