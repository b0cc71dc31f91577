"""The plots of a run by round, as many side by side as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text
from textual.widget import Widget

from coordinator.fleet import Fleet, Run, called, current_run
from coordinator.tui.plots import accuracy_plot, foot, head, loss_plot, plot, shaded
from coordinator.tui.theme import colours
from coordinator.words import amount, bars, cut, decimal, duration, ranges

GAP = 3
LEAST_WIDE, LEAST_TALL = 26, 5
_PARTS = (("work", "█"), ("wait", "░"), ("aggregate", "▓"), ("evaluate", "▒"))


class RoundPlots(Widget):
    """Loss, accuracy, participation, time, bytes and norms, in this order of importance."""

    DEFAULT_CSS = "RoundPlots { padding: 0 1; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.fleet: Fleet | None = None

    def render(self) -> Text:
        run = current_run(self.fleet) if self.fleet else None
        width, height = self.content_size
        if self.fleet is None or run is None or width < 12 or height < 3:
            return Text("")
        across = max(1, min((width + GAP) // (LEAST_WIDE + GAP), 3 if height > 16 else 6))
        down = max(1, min(height // (LEAST_TALL + 1), -(-len(_PANES) // across)))
        wide = (width + GAP) // across - GAP
        tall = (height - (down - 1)) // down
        lines: list[Text] = []
        for first in range(0, min(across * down, len(_PANES)), across):
            row = [draw(run, self.fleet, wide, tall) for draw in _PANES[first : first + across]]
            lines += ([Text()] if lines else []) + _side_by_side(row, wide, tall)
        return Text("\n").join(lines)


def _side_by_side(panes: Sequence[Sequence[Text]], width: int, height: int) -> list[Text]:
    lines = []
    for number in range(height):
        line = Text(no_wrap=True)
        for pane in panes:
            part = pane[number].copy() if number < len(pane) else Text()
            part.truncate(width, pad=True)
            line.append_text(part).append(" " * GAP)
        lines.append(line)
    return lines


def _with_spread(
    name: str, title: str, otherwise: Callable[[Run, int, int], list[Text]]
) -> Callable[[Run, Fleet, int, int], list[Text]]:
    """Median with the least and the most where peers told them, else the plain bars."""

    def draw(run: Run, fleet: Fleet, width: int, height: int) -> list[Text]:
        spread = [closed.spread.get(name) for closed in run.rounds]
        known = [three for three in spread if three is not None]
        if not known or all(three[0] == three[2] for three in known):
            return otherwise(run, width, height)
        own = colours()
        low, _, high = known[-1]
        note = f"{_short(name, low)} to {_short(name, high)}"
        color = own.green if name == "accuracy" else own.blue
        drawn = []
        for line in ranges(spread, width, max(height - 2, 1)):
            text = Text(no_wrap=True)
            for sign in line:
                text.append(sign, color if sign == "━" else own.faint)
            drawn.append(text)
        ends = (_short(name, known[0][1]), _short(name, known[-1][1]))
        wide = max(len(drawn[0].plain), 12)
        return [head(title, note, width), *drawn, foot(*ends, wide)][:height]

    return draw


def _short(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name == "accuracy" else decimal(value)


def _participation(run: Run, fleet: Fleet, width: int, height: int) -> list[Text]:
    values = [float(closed.peers) for closed in run.rounds]
    refused = sum(closed.refused for closed in run.rounds)
    note = f"{refused} refused" if refused else ""
    return plot("Peers", values, note, width, height, colours().purple, form=lambda v: f"{v:.0f}")


def _bytes(run: Run, fleet: Fleet, width: int, height: int) -> list[Text]:
    up = [float(closed.bytes_up) for closed in run.rounds]
    down = sum(closed.bytes_down for closed in run.rounds)
    note = f"{amount(sum(up))} up, {amount(down)} down"
    return plot("Sent up", up, note, width, height, colours().yellow, form=amount)


def _time(run: Run, fleet: Fleet, width: int, height: int) -> list[Text]:
    """Seconds of the rounds, and how the last one's were spent."""
    own = colours()
    values = [closed.seconds for closed in run.rounds]
    last = run.rounds[-1] if run.rounds else None
    if last is None or not last.spent or height < 6:
        return plot("Time", values, "", width, height, own.accent, form=duration)
    lines = plot("Time", values, "", width, height - 4, own.accent, form=duration)
    whole = sum(last.spent.values()) or 1.0
    for name, sign in _PARTS:
        seconds = last.spent.get(name, 0.0)
        room = max(width - 20, 4)
        line = Text(f"{name:<10}", own.dim).append(f"{duration(seconds):>7}  ", own.ink)
        lines.append(line.append(sign * round(seconds / whole * room), own.accent))
    return lines


def _norms(run: Run, fleet: Fleet, width: int, height: int) -> list[Text]:
    """How far each peer's last update moved the weights."""
    own = colours()
    norms = run.rounds[-1].norms if run.rounds else {}
    title = head("Update norm by peer", "", width)
    if not norms:
        return [title, Text("not told for the last round", own.dim)]
    ordered = sorted(norms.items(), key=lambda item: -item[1])
    if len(ordered) > height - 1:  # too many for a line each: a curve from the largest down
        drawn = bars([norm for _, norm in ordered], width, max(height - 2, 1))
        ends = (decimal(ordered[0][1]), decimal(ordered[-1][1]))
        return [title, *shaded(drawn, own.vermilion), foot(*ends, len(drawn[0]))][:height]
    most = ordered[0][1] or 1.0
    lines = [title]
    for peer, norm in ordered:
        name = called(fleet.peers[peer]) if peer in fleet.peers else peer
        line = Text(f"{cut(name, 10):<11}", own.dim).append(f"{decimal(norm):>7} ", own.ink)
        lines.append(line.append("━" * round(norm / most * max(width - 20, 4)), own.vermilion))
    return lines


_PANES: tuple[Callable[[Run, Fleet, int, int], list[Text]], ...] = (
    _with_spread("loss", "Loss", loss_plot),
    _with_spread("accuracy", "Accuracy", accuracy_plot),
    _time,
    _participation,
    _norms,
    _bytes,
)
