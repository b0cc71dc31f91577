"""The pane of plots: loss and accuracy of the run as bars of text."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.text import Text
from textual.color import Color
from textual.widget import Widget

from coordinator.fleet import Fleet, Run, current_run
from coordinator.rows import accuracy_trend, best_round, loss_trend, run_words
from coordinator.tui.theme import colours
from coordinator.words import DIVERGED, bars, cut, decimal

TALLEST = 10


class Plots(Widget):
    """Two plots: side by side in a broad pane, else one above the other, the run's words on top."""

    DEFAULT_CSS = "Plots { padding: 0 1; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.fleet: Fleet | None = None

    def render(self) -> Text:
        run = current_run(self.fleet) if self.fleet else None
        width, height = self.content_size
        if run is None or width < 12 or height < 3:
            return Text("No run yet." if run is None else "", colours().dim)
        if width >= 3 * height:
            half = (width - 3) // 2
            return _beside(_loss(run, half, height), _accuracy(run, half, height), half)
        head = _standing(run, width)
        tall = min((height - len(head) - 1) // 2, TALLEST)
        lines = [*head, *_loss(run, width, tall), Text(), *_accuracy(run, width, tall)]
        return Text("\n").join(lines)


def _standing(run: Run, width: int) -> list[Text]:
    """The run and what it waits for, at most four lines and a blank one."""
    lines = [Text(cut(run.changed.task, width), f"bold {colours().ink}", no_wrap=True)]
    words = wrap(run_words(run).removeprefix(f"{run.changed.task} · "), width)
    return [*lines, *(Text(line, colours().dim, no_wrap=True) for line in words[:3]), Text()]


def _loss(run: Run, width: int, height: int) -> list[Text]:
    values = loss_trend(run.rounds)
    best = next((r for r in run.rounds if r.round == best_round(run)), None)
    note = f"best {decimal(best.loss)} in {best.round}" if best else ""
    return _plot("Loss", values, note, width, height, colours().blue)


def _accuracy(run: Run, width: int, height: int) -> list[Text]:
    values = accuracy_trend(run.rounds)
    known = [value for value in values if value is not None]
    note = f"best {100 * max(known):.1f} %" if known else ""
    return _plot("Accuracy", values, note, width, height, colours().green, percent=True)


def _plot(
    title: str,
    values: Sequence[float | None],
    note: str,
    width: int,
    height: int,
    color: str,
    *,
    percent: bool = False,
) -> list[Text]:
    """Title, bars and a foot with the first and the last value: `height` lines."""
    head = Text.assemble((title, f"bold {colours().ink}"), no_wrap=True)
    if len(title) + len(note) + 2 <= width:
        head.append(" " * (width - len(title) - len(note))).append(note, colours().dim)
    if not values:
        return [head, Text("no round closed yet", colours().dim), *[Text()] * (height - 2)]
    drawn = bars(values, width, max(height - 2, 1))
    lines = shaded(drawn, color)
    first, last = (_value(value, percent) for value in (values[0], values[-1]))
    wide = max(len(drawn[-1]), len(first) + len(last) + 3)
    foot = Text(first, colours().dim).append(
        " " + "╌" * (wide - len(first) - len(last) - 2) + " ", colours().faint
    )
    foot.append(last, colours().vermilion if values[-1] is None else colours().ink)
    return [head, *lines, foot][:height]


def shaded(drawn: Sequence[str], color: str) -> list[Text]:
    """The bars with a bright edge on top of a dark body: the curve is what is seen."""
    body = Color.parse(color).blend(Color.parse(colours().ground), 0.6).hex
    lines, above = [], " " * len(drawn[0])
    for line in drawn:
        text = Text(no_wrap=True)
        for over, block in zip(above, line, strict=True):
            text.append(
                block, colours().vermilion if block == "✕" else color if over == " " else body
            )
        lines.append(text)
        above = line
    return lines


def _value(value: float | None, percent: bool) -> str:
    if value is None:
        return DIVERGED
    return f"{100 * value:.1f} %" if percent else decimal(value)


def _beside(left: list[Text], right: list[Text], width: int) -> Text:
    lines = []
    for one, other in zip(left, right, strict=False):
        line = one.copy()
        line.truncate(width, pad=True)
        lines.append(line.append("   ").append_text(other))
    return Text("\n").join(lines)
