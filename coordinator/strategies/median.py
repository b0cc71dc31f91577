"""Median and trimmed mean, coordinate by coordinate. Yin et al. 2018, arXiv 1803.01498.

Every update is needed, but only a piece of each at a time: the memory does not grow with the peers.
"""

from __future__ import annotations

import math
from typing import Any

from coordinator.storage.run_events import RunSpec
from coordinator.strategies.adapter import Recipe, least
from protocols.codecs import registry
from protocols.errors import UsageFault


class Coordinatewise(Recipe):
    feed = "parts"
    weighs_peers = False

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        refuse_sparse(spec)


class FedMedian(Coordinatewise):
    def check_quorum(self, made: Any, quorum: int) -> None:
        least("a median that one peer cannot move at will", 3, quorum)


class FedTrimmedAvg(Coordinatewise):
    def check_quorum(self, made: Any, quorum: int) -> None:
        if made.beta > 0:  # fewer, and nobody is cut off: a plain mean without weights
            least(f"a trimmed mean with beta={made.beta:g}", math.ceil(1 / made.beta), quorum)


def refuse_sparse(spec: RunSpec) -> None:
    """Raise UsageFault for a codec that sends few coordinates.

    In most coordinates most updates then say "no change", and so does their median.
    """
    if registry.is_sparse(str(getattr(spec, "codec", ""))):
        raise UsageFault(
            f"{spec.strategy} and the codec {getattr(spec, 'codec', '')} do not go together: "
            "few peers send the same coordinate, and what few say is cut off",
            "another codec (int8, sign), or multikrum",
        )
