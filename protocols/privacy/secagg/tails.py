"""Metrics and tallies as numbers that are summed beside the update. Pure.

A metric is two numbers, its value times the peer's weight and the weight, so that the mean is over
the peers whose value is finite. A tally is summed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from protocols.messages.envelope import Metrics, Tallies
from protocols.privacy.secagg.messages import TailNames

#: The sum of 1,024 peers with the largest weight then fits into 63 bits: see `ring.encode_tail`.
_MAX_VALUE = 2.0**15
#: How finely a metric is summed, as a part of the largest weight. An accuracy is a fraction of few
#: examples: from a finer sum of three peers, the accuracy of each could be computed.
_STEP = 2.0**-12


def names(metrics: Metrics, tallies: Tallies) -> TailNames:
    """The names of these metrics, for the plan."""
    return TailNames(
        metrics=tuple(sorted(metrics)),
        tallies={name: len(tallies[name]) for name in sorted(tallies) if tallies[name]},
    )


def count(of: TailNames) -> int:
    """How many numbers these metrics are."""
    return 2 * len(of.metrics) + sum(of.tallies.values())


def values(
    of: TailNames, metrics: Metrics, tallies: Tallies, weight: int, largest: int
) -> list[float]:
    """The numbers float[count] of one peer, of which the one with the most weight has `largest`.

    A metric that is too large counts as not finite.
    """
    numbers: list[float] = []
    step = _STEP * largest
    for name in of.metrics:
        value = metrics[name]
        is_usable = value is not None and abs(value) <= _MAX_VALUE
        usable = value if is_usable and value is not None else None
        numbers += (
            [round(usable * weight / step) * step, weight] if usable is not None else [0.0, 0.0]
        )
    for name in of.tallies:
        numbers += tallies[name]
    return numbers


def means(of: TailNames, sums: Sequence[float]) -> tuple[Metrics, Tallies]:
    """The mean metrics and the summed tallies of all peers, from the summed numbers.

    A metric that no peer had is None.
    """
    metrics: Metrics = {}
    for number, name in enumerate(of.metrics):
        total, weight = sums[2 * number : 2 * number + 2]
        is_usable = weight > 0 and math.isfinite(total)
        metrics[name] = total / weight if is_usable else None
    tallies: Tallies = {}
    start = 2 * len(of.metrics)
    for name, length in of.tallies.items():
        tallies[name] = list(sums[start : start + length])
        start += length
    return metrics, tallies
