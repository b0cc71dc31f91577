"""Coordinate-wise median and trimmed mean. Yin et al. 2018, arXiv 1803.01498.

They read every update, but only a piece at a time: memory does not grow with the number of peers.
"""

from __future__ import annotations

import math
from typing import Any

from coordinator.strategies.adapter import StrategyAdapter, require_quorum


class Coordinatewise(StrategyAdapter):
    feed = "parts"
    weighs_peers = False
    takes_sparse = False


class FedMedian(Coordinatewise):
    def check_quorum(self, strategy: Any, quorum: int) -> None:
        require_quorum("a median that one peer cannot move at will", 3, quorum)


class FedTrimmedAvg(Coordinatewise):
    def check_quorum(self, strategy: Any, quorum: int) -> None:
        if strategy.beta > 0:  # with fewer updates, none is trimmed
            require_quorum(
                f"a trimmed mean with beta={strategy.beta:g}", math.ceil(1 / strategy.beta), quorum
            )
