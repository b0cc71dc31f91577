"""The pane of plots: loss and accuracy of the run as bars of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
            return _beside(loss_plot(run, half, height), accuracy_plot(run, half, height), half)
        head = _standing(run, width)
        tall = min((height - len(head) - 1) // 2, TALLEST)
        lines = [*head, *loss_plot(run, width, tall), Text(), *accuracy_plot(run, width, tall)]
        return Text("\n").join(lines)


def _standing(run: Run, width: int) -> list[Text]:
    """The run and what it waits for, at most four lines and a blank one."""
    lines = [Text(cut(run.changed.task, width), f"bold {colours().ink}", no_wrap=True)]
    words = wrap(run_words(run).removeprefix(f"{run.changed.task} · "), width)
    return [*lines, *(Text(line, colours().dim, no_wrap=True) for line in words[:3]), Text()]


def loss_plot(run: Run, width: int, height: int) -> list[Text]:
    """The loss by round."""
    values = loss_trend(run.rounds)
    best = next((r for r in run.rounds if r.round == best_round(run)), None)
    note = f"best {decimal(best.loss)} in {best.round}" if best else ""
    return plot("Loss", values, note, width, height, colours().blue)


def accuracy_plot(run: Run, width: int, height: int) -> list[Text]:
    """The accuracy by round."""
    values = accuracy_trend(run.rounds)
    known = [value for value in values if value is not None]
    note = f"best {100 * max(known):.1f} %" if known else ""
    return plot("Accuracy", values, note, width, height, colours().green, form=_percent)


def plot(
    title: str,
    values: Sequence[float | None],
    note: str,
    width: int,
    height: int,
    color: str,
    *,
    form: Callable[[float], str] = decimal,
) -> list[Text]:
    """Title, bars and a foot with the first and the last value: `height` lines."""
    top = head(title, note, width)
    if not values:
        return [top, Text("no round closed yet", colours().dim), *[Text()] * (height - 2)]
    drawn = bars(values, width, max(height - 2, 1))
    lines = shaded(drawn, color)
    first, last = (DIVERGED if v is None else form(v) for v in (values[0], values[-1]))
    end = foot(first, last, len(drawn[-1]), bad=values[-1] is None)
    return [top, *lines, end][:height]


def head(title: str, note: str, width: int) -> Text:
    """The title at the left, a note at the right if there is room."""
    line = Text.assemble((title, f"bold {colours().ink}"), no_wrap=True)
    if len(title) + len(note) + 2 <= width:
        line.append(" " * (width - len(title) - len(note))).append(note, colours().dim)
    return line


def foot(first: str, last: str, width: int, *, bad: bool = False) -> Text:
    """The first and the last value, and a line between them."""
    wide = max(width, len(first) + len(last) + 3)
    line = Text(first, colours().dim)
    line.append(" " + "╌" * (wide - len(first) - len(last) - 2) + " ", colours().faint)
    return line.append(last, colours().vermilion if bad else colours().ink)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


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


def _beside(left: list[Text], right: list[Text], width: int) -> Text:
    lines = []
    for one, other in zip(left, right, strict=False):
        line = one.copy()
        line.truncate(width, pad=True)
        lines.append(line.append("   ").append_text(other))
    return Text("\n").join(lines)
