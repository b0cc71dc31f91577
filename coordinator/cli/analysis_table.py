"""The result of an analysis as a table for people. Pure."""

from __future__ import annotations

import math
from typing import Any

from coordinator.jobs.analysis import AnalysisResult, Figure

_BARS = "▁▂▃▄▅▆▇█"


def rows(answer: AnalysisResult) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row of cells for each group."""
    has_count = "count" in answer.figures
    titles = [*answer.by, *([] if has_count else ["rows"]), *answer.figures]
    rows = []
    for group in answer.groups:
        values = ["–" if value is None else value for value in group.group]
        count = [] if has_count else [f"{group.rows:,}"]
        rows.append([*values, *count, *map(format_figure, group.figures)])
    return titles, rows


def format_figure(figure: Figure) -> str:
    """A figure with six significant digits; a histogram as bars between its ends."""
    match figure:
        case None:
            return "–"
        case bool() | int():
            return f"{figure:,}"
        case float():
            return f"{figure:,.6g}" if math.isfinite(figure) else "–"
        case {"counts": _}:
            return _bars(figure)
        case dict():
            return f"{figure['least']:,} to {figure['most']:,}"


def _bars(bins: dict[str, Any]) -> str:
    counts = bins["counts"]
    most = max(counts, default=0) or 1
    bars = "".join(_BARS[math.ceil(count / most * 7)] for count in counts)
    outside = [f"{bins[side]:,} {side}" for side in ("below", "above") if bins.get(side)]
    ends = f"{format_figure(float(bins['least']))} {bars} {format_figure(float(bins['most']))}"
    return f"{ends} ({', '.join(outside)})" if outside else ends
