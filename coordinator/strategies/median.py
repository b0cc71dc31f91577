"""Median and trimmed mean, coordinate by coordinate. Yin et al. 2018, arXiv 1803.01498.

Every update is needed, but only a piece of each at a time: the memory does not grow with the peers.
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
        if strategy.beta > 0:  # fewer, and nobody is cut off: a plain mean without weights
            require_quorum(
                f"a trimmed mean with beta={strategy.beta:g}", math.ceil(1 / strategy.beta), quorum
            )


def refuse_sparse(spec: RunSpec) -> None:
    """Raise UsageError for a codec that sends few coordinates.

    In most coordinates most updates then say "no change", and so does their median.
    """
    if registry.is_sparse(str(getattr(spec, "codec", ""))):
        raise UsageError(
            f"{spec.strategy} and the codec {getattr(spec, 'codec', '')} do not go together: "
            "few peers send the same coordinate, and what few say is cut off",
            "another codec (int8, sign), or multikrum",
        )
