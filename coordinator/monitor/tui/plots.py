"""How a plot looks: a title with the last value, an axis, the drawing, the first and last round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from rich.style import Style
from rich.text import Text
from textual.color import Color

from coordinator.fleet.reducer import finite
from coordinator.monitor.charts import Scale, Values, band, bar_width, curve, fit_scale, stack
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import DIVERGED, brief, truncate

Format = Callable[[float], str]
MIN_WIDTH_AXIS = 22  # narrower panes have no axis
Rounds = tuple[int, int]


def title_line(title: str, last: Text, notes: Sequence[str], width: int) -> Text:
    """The title and the last value at the left; at the right the first note that has room."""
    line = Text.assemble((title, f"bold {colors().text}"), " ", last, no_wrap=True)
    note = next((one for one in notes if len(line.plain) + len(one) + 2 <= width), "")
    line.append(" " * (width - len(line.plain) - len(note))).append(note, colors().dim)
    return line


def curve_plot(
    title: str,
    values: Values,
    width: int,
    height: int,
    color: str,
    *,
    rounds: Rounds,
    fmt: Format = brief,
    notes: Sequence[str] = (),
    spread: tuple[Values, Values] | None = None,
) -> list[Text]:
    """A curve in `height` lines; `between` is the least and the most of all peers, shaded."""
    values = [finite(value) for value in values]
    scale = fit_scale([*values, *spread[0], *spread[1]] if spread else values)
    last = values[-1] if values else None
    word = DIVERGED if last is None else fmt(last)
    end = Text(word, colors().vermilion if last is None else color)
    if scale is None:
        return _empty_plot(title, end if values else Text(), width, height)
    tall = max(height - 2, 1)
    labels = _axis_labels(scale, tall, width, fmt)
    wide = width - len(labels[0])
    inside = band(*spread, wide, tall, scale) if spread else [[False] * wide] * tall
    tint = _tint(color, 0.78)
    lines = [title_line(title, end, notes, width)]
    for label, drawn, shade in zip(labels, curve(values, wide, tall, scale), inside, strict=True):
        line = Text(label, colors().faint, no_wrap=True)
        for sign, shaded in zip(drawn, shade, strict=True):
            ink = colors().vermilion if sign == "✕" else color
            line.append(sign, Style(color=ink, bgcolor=tint if shaded else None))
        lines.append(line)
    return [*lines, _round_axis(rounds, width, len(labels[0]))][:height]


def stack_plot(
    title: str,
    parts: Sequence[tuple[str, Sequence[float]]],
    width: int,
    height: int,
    *,
    rounds: Rounds,
    fmt: Format = brief,
    notes: Sequence[str] = (),
) -> list[Text]:
    """Bars from zero, each part in its colour: (colour, value by round)."""
    parts = [(color, [_clamp(value) for value in values]) for color, values in parts]
    totals = [sum(at) for at in zip(*(values for _, values in parts), strict=True)]
    if not totals:
        return _empty_plot(title, Text(), width, height)
    part_colors = [color for color, _ in parts]
    scale = Scale(0.0, max(totals))
    tall = max(height - 2, 1)
    labels = _axis_labels(scale, tall, width, fmt)
    wide = width - len(labels[0])
    lines = [title_line(title, Text(fmt(totals[-1]), part_colors[0]), notes, width)]
    blocks = stack([values for _, values in parts], wide, tall, scale.high)
    for label, drawn in zip(labels, blocks, strict=True):
        line = Text(label, colors().faint, no_wrap=True)
        for block in drawn:
            line.append(
                block.char, _block_style(part_colors, block.part, block.part_above, block.is_top)
            )
        lines.append(line)
    used = min(bar_width(len(totals), wide) * len(totals), wide)
    return [*lines, _round_axis(rounds, len(labels[0]) + used, len(labels[0]))][:height]


def _clamp(value: float) -> float:
    """Not below zero, and not so large that a few of them have no sum."""
    return min(max(finite(value) or 0.0, 0.0), 1e300)


def _block_style(part_colors: Sequence[str], part: int, over: int, edge: bool) -> Style | str:
    if part < 0:
        return ""
    if len(part_colors) > 1:
        return Style(color=part_colors[part], bgcolor=part_colors[over] if over >= 0 else None)
    # One part alone: a bright edge on a dark body, so that the curve is what is seen.
    return Style(color=part_colors[0] if edge else _tint(part_colors[0], 0.55))


@lru_cache(64)
def _blend(color: str, ground: str, share: float) -> str:
    return Color.parse(color).blend(Color.parse(ground), share).hex


def _tint(color: str, share: float) -> str:
    return _blend(color, colors().background, share)


def _axis_labels(scale: Scale, tall: int, width: int, fmt: Format) -> list[str]:
    """The axis: the value at the top, at the foot and, where there is room, in the middle."""
    if width < MIN_WIDTH_AXIS:
        return [""] * tall
    words = {tall - 1: fmt(scale.low) if scale.low else "0", 0: fmt(scale.high)}
    if tall >= 7 and scale.high > scale.low:
        words[tall // 2] = fmt(scale.middle)
    wide = max(map(len, words.values()))
    return [f"{words.get(line, ''):>{wide}} " for line in range(tall)]


def _round_axis(rounds: Rounds, width: int, indent: int) -> Text:
    first, last = str(rounds[0]), str(rounds[1])
    if rounds[0] == rounds[1] or width - indent < len(first) + len(last) + 3:
        return Text(" " * indent + first, colors().dim, no_wrap=True)
    line = Text(" " * indent + first, colors().dim, no_wrap=True)
    line.append(" " + "╌" * (width - indent - len(first) - len(last) - 2) + " ", colors().faint)
    return line.append(last)


def _empty_plot(title: str, end: Text, width: int, height: int) -> list[Text]:
    lines = [title_line(title, end, (), width), Text("no round closed yet", colors().dim)]
    return [*lines, *[Text()] * (height - 2)][:height]


def bar_list(
    title: str, rows: Sequence[tuple[str, str, float]], width: int, color: str
) -> list[Text]:
    """A line for each (name, words, share of the whole width): horizontal bars."""
    wide = min(max((len(name) for name, _, _ in rows), default=0), max(width // 3, 6))
    lines = [title_line(title, Text(), (), width)]
    for name, words, share in rows:
        line = Text(f"{truncate(name, wide):<{wide}} ", colors().dim, no_wrap=True)
        line.append(f"{words:>7} ", colors().text)
        room = max(width - wide - 9, 1)
        lines.append(line.append("━" * max(round(share * room), 1), color))
    return lines


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
