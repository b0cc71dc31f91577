"""The results of a pass over a case. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Figures(NamedTuple):
    """`seconds` of each measured round; CPU seconds per round, and memory, by kind of process.

    Bytes of one round: of the weights for ours; on the wire if a relay counted them.
    """

    seconds: list[float]
    cpu_s_per_round: dict[str, float]
    peak_rss_bytes: dict[str, int]
    resting_rss_bytes: dict[str, int]
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def merged(passes: Sequence[Figures]) -> Figures:
    """All rounds of all passes, with the mean of CPU and the maximum of memory."""
    first = passes[0]
    return Figures(
        seconds=[second for figures in passes for second in figures.seconds],
        cpu_s_per_round={
            kind: statistics.fmean(figures.cpu_s_per_round.get(kind, 0.0) for figures in passes)
            for kind in first.cpu_s_per_round
        },
        peak_rss_bytes=_highest([figures.peak_rss_bytes for figures in passes]),
        resting_rss_bytes=_highest([figures.resting_rss_bytes for figures in passes]),
        bytes_up=first.bytes_up,
        bytes_down=first.bytes_down,
    )


def _highest(found: Sequence[dict[str, int]]) -> dict[str, int]:
    return {
        kind: max(values.get(kind, 0) for values in found)
        for kind in sorted({kind for values in found for kind in values})
    }
