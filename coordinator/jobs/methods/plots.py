"""Plots of text for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH, _HEIGHT = 60, 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def draw_bars(labels: Sequence[str], counts: Sequence[int]) -> list[str]:
    """A horizontal bar for each count."""
    most, width = max(counts, default=0) or 1, max(map(len, labels), default=0)
    lines = []
    for label, count in zip(labels, counts, strict=True):
        eighths = round(count / most * _WIDTH * 8)
        bar = _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{label:>{width}} {bar} {count:,}".rstrip())
    return lines
