"""Prints results as a table with expected bands, and draws curves as SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quality.courses import Band, Course
from benchmarks.quality.measured import Row

_FIGURES = ("end", "best", "to_90", "to_92", "to_93")
_COLORS = ("#1f6f8b", "#d08a2e", "#6a4c93", "#4f9d69", "#c44536", "#7a7a7a", "#b5838d", "#2f4858")


def table(courses: Sequence[Course], rows: Sequence[Row], whole: Mapping[str, float]) -> bool:
    """Print mean ± deviation over the seeds; True if every band held. `whole` are the bytes up of
    whole weights, by split."""
    shown = Table("course", "seeds", "end", "best", "to 90", "to 92", "to 93 %", "bytes up", "held")
    all_held = True
    for course in courses:
        mine = [row for row in rows if row["course"] == course.name]
        if not mine:
            continue
        misses = [
            name
            for name, band in course.bands.items()
            if not _held(band, [row[name] for row in mine])
        ]
        all_held &= not misses
        nbytes = statistics.mean(row["bytes_up_a_round"] for row in mine)
        base = whole.get(course.split)
        ratio = f"1/{base / nbytes:.1f}" if base else f"{nbytes:,.0f}"
        held = ("no: " + ", ".join(misses) if misses else "yes") if course.bands else ""
        shown.add_row(
            course.name,
            str(len(mine)),
            *(_told([row[name] for row in mine]) for name in _FIGURES),
            ratio,
            held,
        )
    Console(width=140).print(shown)
    return all_held


def _held(band: Band, found: list[float | None]) -> bool:
    if None in found:
        return False
    mean = statistics.mean(value for value in found if value is not None)
    # Accuracies have three digits, rounds are integers.
    return band.least <= round(mean, 3 if mean < 1 else 0) <= band.most


def _told(found: list[float | None]) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "–"
    few = f" ({len(values)} of {len(found)})" if len(values) < len(found) else ""
    mean = statistics.mean(values)
    if mean > 1:
        return f"{mean:.0f} [{min(values):.0f}–{max(values):.0f}]{few}"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.3f} ± {deviation:.3f}{few}"


def curves(file: Path, title: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Accuracy against rounds: the mean over the seeds, with their least and most behind it."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "commonweight", "font.size": 9}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
        for number, name in enumerate(names):
            mine = [row["accuracy"] for row in rows if row["course"] == name]
            if not mine:
                continue
            by_round = [[v for v in at if v is not None] for at in zip(*mine, strict=False)]
            across = range(1, len(by_round) + 1)
            color = _COLORS[number % len(_COLORS)]
            axes.plot(across, [statistics.mean(at) for at in by_round], color=color, label=name)
            low, high = [min(at) for at in by_round], [max(at) for at in by_round]
            axes.fill_between(across, low, high, color=color, alpha=0.15, lw=0)
        ends = [row["accuracy"][-1] or 0.0 for row in rows if row["course"] in names]
        lowest = min(0.7, math.floor(10 * min(ends)) / 10) if ends else 0.7
        axes.set(xlabel="round", ylabel="accuracy", ylim=(lowest, 0.97))
        axes.grid(True, which="major", lw=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=9, loc="left")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
