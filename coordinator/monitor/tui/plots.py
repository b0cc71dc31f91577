"""Plots as lines of text: a title with the last value, an axis, the drawing, the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from textwrap import wrap
from typing import NamedTuple

from rich.style import Style
from rich.text import Text
from textual.color import Color

from coordinator.fleet.state import finite
from coordinator.monitor import charts
from coordinator.monitor.charts import Values
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import DIVERGED, Scale, brief, fit_scale, truncate

MIN_WIDTH_AXIS = 22  # narrower plots have no axis
Segment = tuple[str, Style | str]


class Plot(NamedTuple):
    """The frame of a plot: its size in characters, the first and the last round.

    The first of `notes` that fits stands at the right of the title. `nothing`: the text without
    data.
    """

    title: str
    width: int
    height: int
    rounds: tuple[int, int] = (0, 0)
    fmt: Callable[[float], str] = brief
    notes: Sequence[str] = ()
    nothing: str = "no round closed yet"

    def title_line(self, last: Text | None = None) -> Text:
        line = Text.assemble((self.title, f"bold {colors().text}"), " ", no_wrap=True)
        line.append_text(last or Text())
        note = next((one for one in self.notes if len(line) + len(one) + 2 <= self.width), "")
        line.append(" " * (self.width - len(line) - len(note))).append(note, colors().dim)
        return line

    def empty(self, last: Text) -> list[Text]:
        """The plot without data."""
        words = (Text(line, colors().dim) for line in wrap(self.nothing, self.width))
        lines = [self.title_line(last), *words]
        return [*lines, *[Text()] * (self.height - len(lines))][: self.height]

    @property
    def inner_height(self) -> int:
        return max(self.height - 2, 1)

    def axis_labels(self, scale: Scale) -> list[str]:
        """The values at the top, at the bottom and, if there is room, in the middle."""
        tall, fmt = self.inner_height, self.fmt
        if self.width < MIN_WIDTH_AXIS:
            return [""] * tall
        texts = {tall - 1: fmt(scale.low) if scale.low else "0", 0: fmt(scale.high)}
        if tall >= 7 and scale.high > scale.low:
            texts[tall // 2] = fmt(scale.middle)
        wide = max(map(len, texts.values()))
        return [f"{texts.get(line, ''):>{wide}} " for line in range(tall)]

    def framed(
        self, last: Text, labels: list[str], drawn: Iterable[Iterable[Segment]], width: int
    ) -> list[Text]:
        """Title, axis labels with the drawing, and the rounds below `width` of it."""
        lines = [self.title_line(last)]
        for label, segments in zip(labels, drawn, strict=True):
            lines.append(Text.assemble((label, colors().faint), *segments, no_wrap=True))
        return [*lines, self._round_axis(len(labels[0]), width)][: self.height]

    def _round_axis(self, indent: int, width: int) -> Text:
        first, last = map(str, self.rounds)
        line = Text(" " * indent + first, colors().dim, no_wrap=True)
        if first != last and width >= len(first) + len(last) + 3:
            line.append(f" {'╌' * (width - len(first) - len(last) - 2)} ", colors().faint)
            line.append(last)
        return line


class Behind(NamedTuple):
    """A second curve that is drawn dotted behind the first. `share` is its part of the width."""

    values: Values
    color: str
    share: float = 1.0


def curve_plot(
    plot: Plot,
    values: Values,
    color: str,
    spread: tuple[Values, Values] | None = None,
    behind: Behind | None = None,
    share: float = 1.0,
) -> list[Text]:
    """A curve over `share` of the width; the range of all peers, `spread`, is shaded."""
    values = [finite(value) for value in values]
    others = [finite(value) for value in behind.values] if behind else []
    scale = fit_scale(
        [*values, *others, *(spread[0] if spread else ()), *(spread[1] if spread else ())]
    )
    last = values[-1] if values else None
    bad = colors().vermilion
    end = Text(DIVERGED, bad) if last is None else Text(plot.fmt(last), color)
    if scale is None:
        return plot.empty(end if values else Text())
    labels, tall = plot.axis_labels(scale), plot.inner_height
    wide = plot.width - len(labels[0])
    own_wide = max(round(wide * share), 1)
    inside = charts.band(*spread, own_wide, tall, scale) if spread else [[False] * wide] * tall
    tint = _tint(color, 0.78)
    lines = charts.curve(values, own_wide, tall, scale)
    under = [" " * wide] * tall
    if behind and others:
        dotted = charts.curve(others, max(round(wide * behind.share), 1), tall, scale, dotted=True)
        under = [line.ljust(wide) for line in dotted]

    def segment(line: int, x: int) -> Segment:
        char = lines[line][x] if x < own_wide else " "
        shaded = x < len(inside[line]) and inside[line][x]
        background = tint if shaded else None
        if char == " " and behind is not None and under[line][x] != " ":
            return under[line][x], Style(color=behind.color, bgcolor=background)
        return char, Style(color=bad if char == "✕" else color, bgcolor=background)

    drawn = ([segment(line, x) for x in range(wide)] for line in range(tall))
    return plot.framed(end, labels, drawn, wide)


def stack_plot(plot: Plot, parts: Sequence[tuple[str, Sequence[float]]]) -> list[Text]:
    """Bars from zero, stacked: (color, value by round) for each part."""
    heights = [[_clamp(value) for value in values] for _, values in parts]
    totals = [sum(values) for values in zip(*heights, strict=True)]
    if not totals:
        return plot.empty(Text())
    part_colors = [color for color, _ in parts]
    scale = Scale(0.0, max(totals))
    labels, tall = plot.axis_labels(scale), plot.inner_height
    wide = plot.width - len(labels[0])
    drawn = (
        [(block.char, _block_style(part_colors, block)) for block in line]
        for line in charts.stack(heights, wide, tall, scale.high)
    )
    used = min(charts.bar_width(len(totals), wide) * len(totals), wide)
    return plot.framed(Text(plot.fmt(totals[-1]), part_colors[0]), labels, drawn, used)


def _clamp(value: float) -> float:
    """Not negative, and small enough that a sum of several stays finite."""
    return min(max(finite(value) or 0.0, 0.0), 1e300)


def _block_style(part_colors: Sequence[str], block: charts.Block) -> Style | str:
    if block.part < 0:
        return ""
    if len(part_colors) > 1:
        above = block.part_above
        return Style(
            color=part_colors[block.part], bgcolor=part_colors[above] if above >= 0 else None
        )
    # A single part: a bright edge on a dark body, so that the curve stands out.
    return Style(color=part_colors[0] if block.is_top else _tint(part_colors[0], 0.55))


@lru_cache(64)
def _blend(color: str, background: str, share: float) -> str:
    return Color.parse(color).blend(Color.parse(background), share).hex


def _tint(color: str, share: float) -> str:
    return _blend(color, colors().background, share)


def bar_list(plot: Plot, rows: Sequence[tuple[str, str, float]], color: str) -> list[Text]:
    """A horizontal bar for each (name, value, fraction of the full width)."""
    wide = min(max((len(name) for name, _, _ in rows), default=0), max(plot.width // 3, 6))
    room = max(plot.width - wide - 9, 1)
    lines = [plot.title_line()]
    for name, value, fraction in rows:
        line = Text(f"{truncate(name, wide):<{wide}} ", colors().dim, no_wrap=True)
        line.append(f"{value:>7} ", colors().text)
        lines.append(line.append("━" * max(round(fraction * room), 1), color))
    return lines


def ranked_list(plot: Plot, rows: Sequence[tuple[str, str, float]], color: str) -> list[Text]:
    """`bar_list` of the first rows that fit; the last line counts the others."""
    room = max(plot.height - 1, 1)
    if len(rows) <= room:
        return bar_list(plot, rows, color)
    lines = bar_list(plot, rows[: room - 1], color)
    return [*lines, Text(f"and {len(rows) - room + 1} better ones", colors().dim)]


def side_by_side(panes: Sequence[Sequence[Text]], width: int, height: int, gap: int) -> list[Text]:
    """The lines of `panes`, each `width` wide and `gap` apart."""
    lines = []
    for number in range(height):
        line = Text(no_wrap=True)
        for pane in panes:
            part = pane[number].copy() if number < len(pane) else Text()
            part.truncate(width, pad=True)
            line.append_text(part).append(" " * gap)
        line.right_crop(gap)
        lines.append(line)
    return lines
