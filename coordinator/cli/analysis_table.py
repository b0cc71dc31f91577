"""Results of analyses as tables for people. Pure."""

from __future__ import annotations

import math
from typing import Any

from coordinator.jobs.analysis import AnalysisResult, Figure
from coordinator.jobs.methods.results import ResultTable, Value, make_table

_BARS = "▁▂▃▄▅▆▇█"


def table_of(answer: AnalysisResult) -> ResultTable:
    """A row for each group: its values, its number of rows and its figures."""
    has_count = "count" in answer.figures
    titles = [*answer.by, *([] if has_count else ["rows"]), *answer.figures]
    return make_table(
        titles,
        (
            [*group.group, *([] if has_count else [group.rows]), *map(_to_value, group.figures)]
            for group in answer.groups
        ),
    )


def _to_value(figure: Figure) -> Value:
    return format_figure(figure) if isinstance(figure, dict) else figure


def format_value(value: Value) -> str:
    """A value of a table with six significant digits; a text as it is."""
    return value if isinstance(value, str) else format_figure(value)


def format_figure(figure: Figure) -> str:
    """A figure with six significant digits; a histogram as bars between its ends."""
    match figure:
        case None:
            return "–"
        case bool() | int():
            return f"{figure:,}"
        case float():
            return f"{figure:,.6g}" if math.isfinite(figure) else "–"
        case {"counts": dict(levels)}:
            return ", ".join(f"{level} {rows:,}" for level, rows in levels.items()) or "–"
        case {"counts": _}:
            return _bars(figure)
        case {"names": names}:
            return ", ".join(names)
        case {"score": _} | {"sums": _} | {"edges": _}:
            return "sums: see --json"
        case dict():
            return f"{figure['least']:,} to {figure['most']:,}"


def _bars(bins: dict[str, Any]) -> str:
    counts = bins["counts"]
    most = max(counts, default=0) or 1
    bars = "".join(_BARS[math.ceil(count / most * 7)] for count in counts)
    outside = [f"{bins[side]:,} {side}" for side in ("below", "above") if bins.get(side)]
    ends = f"{format_figure(float(bins['least']))} {bars} {format_figure(float(bins['most']))}"
    return f"{ends} ({', '.join(outside)})" if outside else ends
