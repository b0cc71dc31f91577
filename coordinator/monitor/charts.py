"""Curves and stacked bars drawn in characters. Pure.

A curve uses braille: two dots across and four down in each character. A stack uses eighths of
blocks. Values are None or finite (`coordinator.fleet.state.finite`); no value raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from coordinator.remote.formatting import EIGHTHS, Scale, downsample

Values = Sequence[float | None]

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, from the top down
_MIN_SPACED_WIDTH = 3  # bars at least this wide have a blank between them


def resample(values: Values, points: int) -> list[float | None]:
    """`values` as exactly `points` points: linear interpolation, or means if there are more."""
    if len(values) >= points:
        return downsample(values, points)
    if len(values) < 2:
        return list(values) * points
    result: list[float | None] = []
    for point in range(points):
        position = point * (len(values) - 1) / (points - 1)
        left = min(int(position), len(values) - 2)
        fraction = position - left
        before, after = values[left], values[left + 1]
        if before is None or after is None:
            result.append(before if fraction < 0.5 else after)
        else:
            result.append(before * (1 - fraction) + after * fraction)
    return result


def curve(
    values: Values, width: int, height: int, scale: Scale, *, dotted: bool = False
) -> list[str]:
    """`height` lines from the top down, each `width` characters; `✕` marks a None.

    `dotted` draws single dots, every second one, and marks no None.
    """
    cells = [[0] * width for _ in range(height)]
    previous: int | None = None
    for x, value in enumerate(resample(values, 2 * width)):
        y = None if value is None else 4 * height - 1 - scale.step(value, 4 * height)
        if y is not None and dotted:
            if x % 2 == 0:
                cells[y // 4][x // 2] |= _DOTS[0][y % 4]
        elif y is not None:
            start = y if previous is None else previous + (previous < y) - (previous > y)
            # One more dot below: a single one is hard to see on some screens.
            for dot in range(min(start, y), min(max(start, y) + 2, 4 * height)):
                cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        previous = y
    lines = ["".join(chr(0x2800 + dots) if dots else " " for dots in line) for line in cells]
    if height > 0 and None in values and not dotted:
        lines[-1] = _mark_missing(lines[-1], values, width)
    return lines


def _mark_missing(line: str, values: Values, width: int) -> str:
    chars, last = list(line), max(len(values) - 1, 1)
    for index, value in enumerate(values):
        if value is None:
            chars[min(round(index * (width - 1) / last), width - 1)] = "✕"
    return "".join(chars)


def band(low: Values, high: Values, width: int, height: int, scale: Scale) -> list[list[bool]]:
    """`bool[height][width]` from the top down: True where a character is between low and high."""
    inside = [[False] * width for _ in range(height)]
    for x, (lower, upper) in enumerate(
        zip(resample(low, width), resample(high, width), strict=True)
    ):
        if lower is None or upper is None:
            continue
        bottom, top = (scale.step(value, 4 * height) for value in (lower, upper))
        for line in range(height):
            first = 4 * (height - 1 - line)
            inside[line][x] = min(top, first + 3) - max(bottom, first) >= 1
    return inside


class Block(NamedTuple):
    """A character of a stack: `part` colors its lower half, `part_above` its background; -1 is
    none. `is_top`: it is the top of its bar."""

    char: str
    part: int = -1
    part_above: int = -1
    is_top: bool = False


def stack(
    parts: Sequence[Sequence[float]], width: int, height: int, high: float
) -> list[list[Block]]:
    """Stacked bars from 0 to `high`: `height` lines from the top down.

    All `parts` have the same length and no negative value. Every bar is `bar_width` wide; if there
    are more bars than characters, neighbors are averaged.
    """
    lines = [[Block(" ")] * width for _ in range(height)]
    bars = [[value or 0.0 for value in downsample(part, width)] for part in parts]
    count = len(bars[0]) if bars else 0
    pitch = bar_width(count, width)
    for bar in range(count):
        left = bar * pitch
        right = left + pitch - (pitch >= _MIN_SPACED_WIDTH)
        ends = [_to_eighths(top, high, 8 * height) for top in accumulate(p[bar] for p in bars)]
        for line in range(height):
            block = _block(ends, 8 * (height - 1 - line))
            lines[line][left:right] = [block] * (right - left)
    return lines


def bar_width(count: int, width: int) -> int:
    """Characters of each of `count` bars, including the blank after it."""
    return max(width // count, 1) if count else 0


def _to_eighths(top: float, high: float, limit: int) -> int:
    """The height in eighths; at least 1 for a positive value, so that it stays visible."""
    if top <= 0 or high <= 0:
        return 0
    return min(max(round(top / high * limit), 1), limit)


def _block(ends: Sequence[int], bottom: int) -> Block:
    part = next((n for n, end in enumerate(ends) if end > bottom), -1)
    if part < 0:
        return Block(" ")
    filled = min(ends[part] - bottom, 8)
    above = next((n for n, end in enumerate(ends) if end > bottom + filled), -1)
    is_top = bottom < ends[-1] <= bottom + 8
    return Block(EIGHTHS[filled], part, above if filled < 8 else -1, is_top)
