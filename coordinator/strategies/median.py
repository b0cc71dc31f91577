"""Coordinate-wise median and trimmed mean. Yin et al. 2018, arXiv 1803.01498.

They read every update, but only a piece at a time: memory does not grow with the number of peers.
"""

from __future__ import annotations

import math
from typing import Any

from coordinator.storage.run_events import RunSpec
from coordinator.strategies.adapter import StrategyAdapter, require_quorum
from protocols.codecs import registry
from protocols.errors import UsageError


class Coordinatewise(StrategyAdapter):
    feed = "parts"
    weighs_peers = False

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        refuse_sparse(spec)


class FedMedian(Coordinatewise):
    def check_quorum(self, strategy: Any, quorum: int) -> None:
        require_quorum("a median that one peer cannot move at will", 3, quorum)


class FedTrimmedAvg(Coordinatewise):
    def check_quorum(self, strategy: Any, quorum: int) -> None:
        if strategy.beta > 0:  # with fewer updates, none is trimmed
            require_quorum(
                f"a trimmed mean with beta={strategy.beta:g}", math.ceil(1 / strategy.beta), quorum
            )


def refuse_sparse(spec: RunSpec) -> None:
    """Raise UsageError for a codec that sends few coordinates.

    Most updates then have no change in most coordinates, and neither has their median.
    """
    if registry.is_sparse(spec.codec):
        raise UsageError(
            f"{spec.strategy} cannot use the codec {spec.codec}: few peers send the same "
            "coordinate, and values of few peers are cut off",
            "use another codec (int8, sign), or multikrum",
        )
