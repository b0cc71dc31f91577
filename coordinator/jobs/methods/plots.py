"""Plots of text for a terminal. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

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


def draw_curves(curves: Mapping[str, Sequence[float]], ends: Sequence[float]) -> list[str]:
    """Survival curves: `curves` are the values from 0 to 1 in bins that end at `ends`."""
    marks = dict(zip(curves, "●○▲△■□◆◇", strict=False))
    canvas = [[" "] * _WIDTH for _ in range(_HEIGHT + 1)]
    for name, mark in marks.items():
        for column in range(_WIDTH):
            time = (column + 0.5) / _WIDTH * ends[-1]
            before = bisect_right(ends, time)
            value = curves[name][before - 1] if before else 1.0
            canvas[round((1 - value) * _HEIGHT)][column] = mark
    labels = {0: "1.0", _HEIGHT // 2: "0.5", _HEIGHT: "0.0"}
    lines = [f"{labels.get(i, ''):>3} │{''.join(row)}".rstrip() for i, row in enumerate(canvas)]
    lines.append("    └" + "─" * _WIDTH)
    lines.append(f"     0{ends[-1]:>{_WIDTH - 1}g}")
    return [*lines, "     " + "   ".join(f"{mark} {name}" for name, mark in marks.items())]


def draw_forest(rows: Sequence[tuple[str, float, float, float]]) -> list[str]:
    """Estimates with their intervals, one a line: `rows` are name, estimate, low, high."""
    least, most = min(row[2] for row in rows), max(row[3] for row in rows)
    least, most = min(least, 0.0), max(most, 0.0)
    width = max(len(row[0]) for row in rows)

    def place(value: float) -> int:
        return round((value - least) / ((most - least) or 1.0) * (_WIDTH - 1))

    lines = []
    for name, value, low, high in rows:
        line = [" "] * _WIDTH
        line[place(0.0)] = "┊"
        line[place(low) : place(high) + 1] = "─" * (place(high) - place(low) + 1)
        line[place(value)] = "■"
        lines.append(f"{name:>{width}} {''.join(line)}".rstrip())
    return [*lines, f"{'':{width}} {least:<{_WIDTH // 2}g}{most:>{_WIDTH // 2}g}"]
