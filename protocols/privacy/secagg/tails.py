"""Metrics and tallies as numbers that are summed beside the update. Pure.

A metric is two numbers, its value times the peer's examples and the examples, so that the mean is
over the peers whose value is finite. A tally is summed as it is.

The plan's weights are not used. An accuracy is a fraction of few examples: from a mean with other
weights and the sum of all hits, the accuracy of each of three peers could be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from protocols.messages.envelope import Metrics, Tallies
from protocols.privacy.secagg import ring
from protocols.privacy.secagg.messages import TailNames

#: The sum of 1,024 peers with the largest weight then fits into 63 bits: see `ring.encode_tail`.
_MAX_VALUE = 2.0**15
#: How finely a metric is summed, as a part of the most examples. With fewer than 1 / _STEP of
#: these, hits are whole numbers, so that the sum tells no more of them than a tally.
_STEP = 2.0**-12
#: More examples are counted in units of 2, 4, 8, …
_MAX_COUNT_BITS = 16


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
    of: TailNames, metrics: Metrics, tallies: Tallies, examples: int, most: int, peers: int = 1
) -> list[float]:
    """The numbers float[count] of a peer with `examples`, in a cohort of `peers`, where one has
    `most`.

    A metric that is too large counts as not finite. A number of a tally that is too large counts as
    the largest one, which shows in the sum (`known`).
    """
    numbers: list[float] = []
    bits = most.bit_length()
    count = examples * 2.0 ** min(0, _MAX_COUNT_BITS - bits)
    step = _STEP * 2.0 ** min(_MAX_COUNT_BITS, bits - 1)
    for name in of.metrics:
        value = metrics[name]
        if value is not None and abs(value) <= _MAX_VALUE:
            numbers += [round(value * count / step) * step, count]
        else:
            numbers += [0.0, 0.0]
    limit = ring.largest_in_tail(peers)
    for name in of.tallies:
        numbers += [min(limit, max(-limit, number)) for number in tallies[name]]
    return numbers


def known(tallies: Tallies, peers: int) -> Tallies:
    """The summed tallies in which no number of a peer can have been too large."""
    limit = ring.largest_in_tail(peers) - 1
    return {name: sums for name, sums in tallies.items() if all(abs(n) < limit for n in sums)}


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
