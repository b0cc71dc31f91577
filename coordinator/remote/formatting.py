"""Amounts, ages and trends as text. Pure.

Every number passes `coordinator.fleet.state.finite` first, so that a NaN or an infinity never
breaks a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from coordinator.fleet.state import finite

DIVERGED = "✕ diverged"
NOTHING = "–"
EIGHTHS = " ▁▂▃▄▅▆▇█"

# --- amounts ---------------------------------------------------------------------------------


def _scale(value: float, units: Sequence[str]) -> tuple[float, str]:
    """The value in the first unit, each 1000 times the one before, in which it is below 1000."""
    for unit in units[:-1]:
        if value < 999.5:
            return value, unit
        value /= 1000
    return value, units[-1]


def format_bytes(num_bytes: float) -> str:
    """Bytes with up to three digits: `999 B`, `1.2 MB`, `34 GB`."""
    value, unit = _scale(finite(num_bytes) or 0.0, ("B", "kB", "MB", "GB", "TB", "PB"))
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "B" else f"{value:.0f} {unit}"


def age(seconds: float) -> str:
    """A duration in at most six characters: `42 s`, `5 min`, `3 h`, `12 d`."""
    value = max(finite(seconds) or 0.0, 0.0)
    for size, unit in ((60, "s"), (60, "min"), (24, "h")):
        if value < size:
            return f"{int(value)} {unit}"
        value /= size
    return f"{min(int(value), 9999)} d"


def stopwatch(seconds: float) -> str:
    """`00:42`, `1:02:03`."""
    whole = int(max(finite(seconds) or 0.0, 0.0))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes:02}:{whole % 60:02}"


def duration(seconds: float) -> str:
    """`0.22 s`, `8.1 s`, `42 s`, then minutes and hours."""
    value = finite(seconds) or 0.0
    if value < 1:
        return f"{value:.2f} s"
    return f"{value:.1f} s" if value < 10 else age(value)


def decimal(value: float | None) -> str:
    """A loss or an accuracy in at most nine characters."""
    number = finite(value)
    if number is None:
        return NOTHING
    size = abs(number)
    return f"{number:.4f}" if size < 10 else f"{number:.4g}" if size < 1e4 else f"{number:.1e}"


def brief(value: float) -> str:
    """A number at an axis, with three digits, in at most seven characters."""
    number = finite(value)
    return NOTHING if number is None else f"{number:#.3g}" if abs(number) < 100 else f"{number:.3g}"


def count(number: float) -> str:
    """`12,345`, then `123 k`, `1.23 M`: at most seven characters."""
    value = finite(number) or 0.0
    if value < 100_000:
        return f"{value:,.0f}"
    value, unit = _scale(value / 1000, ("k", "M", "G", "T"))
    return f"{value:.3g} {unit}" if value < 999.5 else f"{min(value, 9999):.0f} {unit}"


def plural(number: int, noun: str) -> str:
    """`1 peer`, `12,345 peers`."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def percent(value: float) -> str:
    """`95.2 %` for 0.952."""
    number = finite(value)
    return NOTHING if number is None else f"{100 * number:.1f} %"


def rate(per_s: float) -> str:
    """`812/s`, `149 k/s`: at most seven characters."""
    value, unit = _scale(finite(per_s) or 0.0, ("", " k", " M", " G", " T"))
    return f"{min(value, 999):.0f}{unit}/s"


# --- trends ----------------------------------------------------------------------------------


def downsample(values: Sequence[float | None], width: int) -> list[float | None]:
    """At most `width` points: means of neighbors, None where one of them is not finite."""
    clean = [finite(value) for value in values]
    if width <= 0 or len(clean) <= width:
        return clean if width > 0 else []
    edges = [index * len(clean) // width for index in range(width + 1)]
    return [_mean(clean[left:right]) for left, right in pairwise(edges)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    # Divided first, so that two huge losses still have a mean.
    return sum(value / len(known) for value in known) if len(known) == len(values) else None


class Scale(NamedTuple):
    """The values at the bottom and at the top of a pane or a line."""

    low: float
    high: float

    def step(self, value: float, steps: int) -> int:
        """The index, from the bottom, of `value` among `steps`. Halved, so nothing overflows."""
        size = self.high / 2 - self.low / 2
        if size <= 0:
            return (steps - 1) // 2
        return min(max(round((value / 2 - self.low / 2) / size * (steps - 1)), 0), steps - 1)

    @property
    def middle(self) -> float:
        return self.low / 2 + self.high / 2


def fit_scale(values: Sequence[float | None]) -> Scale | None:
    """The range of the known values; None if no value is known."""
    known = [value for value in values if value is not None]
    return Scale(min(known), max(known)) if known else None


def smooth(values: Sequence[float | None], weight: float = 0.8) -> list[float | None]:
    """Exponential moving averages, as TensorBoard draws them: corrected for the missing past.

    None where a value is not finite; the average begins again after it.
    """
    averages: list[float | None] = []
    average = share = 0.0
    for value in values:
        number = finite(value)
        if number is None:
            average = share = 0.0
        else:
            average = weight * average + (1 - weight) * number
            share = weight * share + (1 - weight)
        averages.append(None if number is None else average / share)
    return averages


def trend(values: Sequence[float | None], width: int) -> str:
    """One line, `▁▂▃▄▅▆▇█`; `✕` where a value is not finite. At most `width` characters."""
    points = downsample(values, width)
    scale = fit_scale(points)
    return "".join(
        "✕" if point is None or scale is None else EIGHTHS[1 + scale.step(point, 8)]
        for point in points
    )


def truncate(text: str, width: int) -> str:
    """`text` in at most `width` characters."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def progress(done: int, of: int, width: int) -> str:
    """A progress bar: `━━━━────`."""
    filled = min(done * width // of, width) if of > 0 else 0
    return "━" * filled + "─" * (width - filled)
