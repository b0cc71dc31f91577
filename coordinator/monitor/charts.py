"""Curves and stacks drawn in characters, for any pane. Pure.

A curve is braille: two dots across and four down in each character. A stack is made of eighths of
blocks. Both take values that `coordinator.fleet.reducer.finite` has passed or None, and never raise
on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from coordinator.remote.formatting import downsample

Values = Sequence[float | None]

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, from the top down
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_MIN_SPACED_WIDTH = 3  # bars as broad as this have a blank between them


class Scale(NamedTuple):
    """The values at the foot and at the top of a pane."""

    low: float
    high: float

    def step(self, value: float, steps: int) -> int:
        """Which of `steps` steps from the foot up `value` lies in. Halves, so nothing overflows."""
        size = self.high / 2 - self.low / 2
        if size <= 0:
            return (steps - 1) // 2
        return min(max(round((value / 2 - self.low / 2) / size * (steps - 1)), 0), steps - 1)

    @property
    def middle(self) -> float:
        return self.low / 2 + self.high / 2


def fit_scale(values: Values, *, zero: bool = False) -> Scale | None:
    """From the least to the most of what is known, from 0 if `zero`; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Scale(min(0.0, *known) if zero else min(known), max(known))


def resample(values: Values, points: int) -> list[float | None]:
    """`values` over exactly `points` points: between two of them a straight line, or means."""
    if len(values) >= points:
        return downsample(values, points)
    if len(values) < 2:
        return list(values) * points
    found: list[float | None] = []
    for point in range(points):
        place = point * (len(values) - 1) / (points - 1)
        left = min(int(place), len(values) - 2)
        share = place - left
        one, other = values[left], values[left + 1]
        if one is None or other is None:
            found.append(one if share < 0.5 else other)
        else:
            found.append(one * (1 - share) + other * share)
    return found


def curve(values: Values, width: int, height: int, scale: Scale) -> list[str]:
    """`height` lines from the top down, each `width` characters; `✕` below what is None."""
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for x, value in enumerate(resample(values, 2 * width)):
        y = None if value is None else 4 * height - 1 - scale.step(value, 4 * height)
        if y is not None:
            start = y if before is None else before + (before < y) - (before > y)
            # One dot more below: a single one is hard to see on some screens.
            for dot in range(min(start, y), min(max(start, y) + 2, 4 * height)):
                cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        before = y
    lines = ["".join(chr(0x2800 + dots) if dots else " " for dots in line) for line in cells]
    if height > 0 and None in values:
        lines[-1] = _mark_missing(lines[-1], values, width)
    return lines


def _mark_missing(line: str, values: Values, width: int) -> str:
    signs, last = list(line), max(len(values) - 1, 1)
    for place, value in enumerate(values):
        if value is None:
            signs[min(round(place * (width - 1) / last), width - 1)] = "✕"
    return "".join(signs)


def band(low: Values, high: Values, width: int, height: int, scale: Scale) -> list[list[bool]]:
    """For each line from the top down which of its characters lie between `low` and `high`."""
    inside = [[False] * width for _ in range(height)]
    pairs = zip(resample(low, width), resample(high, width), strict=True)
    for x, (least, most) in enumerate(pairs):
        if least is None or most is None:
            continue
        foot, top = (scale.step(value, 4 * height) for value in (least, most))
        for line in range(height):
            first = 4 * (height - 1 - line)
            inside[line][x] = min(top, first + 3) - max(foot, first) >= 1
    return inside


class Block(NamedTuple):
    """A character of a stack: `part` is its lower colour, `over` what it stands against, -1 for
    nothing. `edge`: it is the top of its bar."""

    char: str
    part: int = -1
    part_above: int = -1
    is_top: bool = False


def stack(
    parts: Sequence[Sequence[float]], width: int, height: int, high: float
) -> list[list[Block]]:
    """Bars from 0 to `high`, one upon the other by part; `height` lines from the top down.

    `parts` are as long as each other and not below 0. All bars are equally broad; `bar_width` says
    how much. Too many are put together.
    """
    lines = [[Block(" ")] * width for _ in range(height)]
    thin = [[value or 0.0 for value in downsample(part, width)] for part in parts]
    count = len(thin[0]) if thin else 0
    broad = bar_width(count, width)
    for bar in range(count):
        left = bar * broad
        right = left + broad - (broad >= _MIN_SPACED_WIDTH)
        tops = list(accumulate(part[bar] for part in thin))
        ends = [_to_eighths(top, high, 8 * height) for top in tops]
        for line in range(height):
            block = _block(ends, 8 * (height - 1 - line))
            lines[line][left:right] = [block] * (right - left)
    return lines


def bar_width(count: int, width: int) -> int:
    """Characters of each of `count` bars, the blank after it included."""
    return max(width // count, 1) if count else 0


def _to_eighths(top: float, high: float, most: int) -> int:
    """Something is never drawn as nothing."""
    if top <= 0 or high <= 0:
        return 0
    return min(max(round(top / high * most), 1), most)


def _block(ends: Sequence[int], foot: int) -> Block:
    part = next((n for n, end in enumerate(ends) if end > foot), -1)
    if part < 0:
        return Block(" ")
    filled = min(ends[part] - foot, 8)
    over = next((n for n, end in enumerate(ends) if end > foot + filled), -1) if filled < 8 else -1
    return Block(_EIGHTHS[filled], part, over, is_top=foot < ends[-1] <= foot + 8)
