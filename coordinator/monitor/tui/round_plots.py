"""The plots of a run by round, as many as there is room for: what peers measured, time, bytes.

A metric that only a newer task or strategy tells gets a plot of its own: nothing here names it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from textwrap import wrap

from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from coordinator.fleet.reducer import Fleet, Run, called, current_run
from coordinator.monitor.charts import Values
from coordinator.monitor.round_table import (
    best_round,
    describe_run,
    metric_names,
    participation,
    worst_peer,
)
from coordinator.monitor.tui.plots import (
    Rounds,
    bar_list,
    curve_plot,
    side_by_side,
    stack_plot,
    title_line,
)
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import brief, decimal, duration, format_bytes, percent, truncate
from protocols.messages.envelope import RoundClosed

GAP = 3
MIN_PANE_WIDTH, MIN_PANE_HEIGHT = 26, 6
MIN_HEIGHT_TWO_ROWS = 15
MAX_ROUNDS = 500
Pane = Callable[[int, int], list[Text]]


class RoundPlots(Widget):
    """Loss and accuracy first, then in this order of importance; `only` bounds how many.

    With `words` the run and what it waits for stand above them.
    """

    DEFAULT_CSS = "RoundPlots { padding: 0 1; }"

    def __init__(
        self,
        *,
        id: str | None = None,  # noqa: A002
        only: int | None = None,
        words: bool = False,
    ) -> None:
        super().__init__(id=id)
        self.fleet: Fleet | None = None
        self._only, self._words = only, words
        self._shown: tuple[object, ...] = ()
        self._drawn: tuple[object, ...] = ()
        self._plots: list[Strip] = []
        self._strips: list[Strip] = []

    def show(self, fleet: Fleet | None) -> None:
        """Draw `fleet`'s run, if what is drawn of it has changed."""
        run = current_run(fleet) if fleet else None
        last = run.rounds[-1] if run and run.rounds else None
        words = describe_run(run) if run and self._words else ""
        counts = (len(run.rounds) if run else 0, len(fleet.peers) if fleet else 0)
        shown = (run and run.changed.run, last, counts, colors(), words)
        if shown != self._shown or fleet is not self.fleet:
            self.fleet, self._shown = fleet, shown
            self.refresh()

    def render_lines(self, crop: Region) -> list[Strip]:
        # By lines: Textual takes three times as long to make them of one text.
        self._strips = self._build_strips()
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        if y < len(self._strips):
            return self._strips[y]
        return Strip.blank(self.content_size.width, self.rich_style)

    def _build_strips(self) -> list[Strip]:
        run = current_run(self.fleet) if self.fleet else None
        width, height = self.content_size
        if self.fleet is None or run is None or width < 12 or height < 3:
            return []
        standing = _run_header(run, width) if self._words else []
        base = self.rich_style
        drawn = (*self._shown[:-1], width, height - len(standing), base)
        if drawn != self._drawn:  # what a run waits for changes far more often than its plots
            lines = lay_out(panes(run, self.fleet)[: self._only], width, height - len(standing))
            self._drawn, self._plots = drawn, self._as_strips(lines, width, base)
        return [*self._as_strips(standing, width, base), *self._plots]

    def _as_strips(self, lines: list[Text], width: int, base: Style) -> list[Strip]:
        console = self.app.console
        return [
            Strip(line.render(console)).apply_style(base).adjust_cell_length(width, base)
            for line in lines
        ]


def _run_header(run: Run, width: int) -> list[Text]:
    """The run and what it waits for, at most four lines and a blank one."""
    lines = [Text(truncate(run.changed.task, width), f"bold {colors().text}", no_wrap=True)]
    words = wrap(describe_run(run).removeprefix(f"{run.changed.task} · "), width)
    return [*lines, *(Text(line, colors().dim, no_wrap=True) for line in words[:3]), Text()]


def lay_out(shown: list[Pane], width: int, height: int) -> list[Text]:
    """The first of `shown` that fit, in rows of equal panes."""
    across = max(1, min((width + GAP) // (MIN_PANE_WIDTH + GAP), len(shown)))
    if height >= MIN_HEIGHT_TWO_ROWS and across > 3 and len(shown) > 3:
        across = 3
    down = max(1, min((height + 1) // (MIN_PANE_HEIGHT + 1), -(-len(shown) // across)))
    wide = (width + GAP) // across - GAP
    tall = (height - (down - 1)) // down
    lines: list[Text] = []
    for first in range(0, min(across * down, len(shown)), across):
        row = [pane(wide, tall) for pane in shown[first : first + across]]
        lines += ([Text()] if lines else []) + side_by_side(row, wide, tall, GAP)
    return lines


def panes(run: Run, fleet: Fleet) -> list[Pane]:
    """Every plot of `run`, the most important first."""
    names = ("loss", "accuracy", *metric_names(run))
    metrics: list[Pane] = [partial(_metric, name, run=run, fleet=fleet) for name in names]
    behind = (_staleness,) if any(closed.staleness for closed in run.rounds) else ()
    told: tuple[Callable[..., list[Text]], ...]
    told = (*behind, _participation, _time, _norms, _bytes)
    return [*metrics[:2], *(partial(one, run=run, fleet=fleet) for one in told), *metrics[2:]]


def _recent(run: Run) -> list[RoundClosed]:
    return run.rounds[-MAX_ROUNDS:]


def _round_range(rounds: list[RoundClosed]) -> Rounds:
    return (rounds[0].round, rounds[-1].round) if rounds else (0, 0)


def _value(closed: RoundClosed, name: str) -> float | None:
    if name in ("loss", "accuracy"):
        return closed.loss if name == "loss" else closed.accuracy
    value = closed.metrics.get(name)
    return closed.spread[name][1] if value is None and name in closed.spread else value


def _metric(name: str, width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """The mean of all peers by their examples, and from the least to the most of them."""
    own = colors()
    color = {"loss": own.blue, "accuracy": own.green}.get(name, own.accent)
    form = percent if name == "accuracy" else brief
    held = [
        closed for closed in _recent(run) if _value(closed, name) is not None or closed.diverged
    ]
    values = [_value(closed, name) for closed in held]
    spread = [closed.spread.get(name) for closed in held]
    between: tuple[Values, Values] | None = None
    notes: list[str] = []
    number = best_round(run)
    best = next((closed for closed in held if closed.round == number), None)
    if best is not None and (at_best := _value(best, name)) is not None:
        notes = [f"★ {form(at_best)} in {best.round}", f"★ {form(at_best)}"]
    if any(three and three[0] < three[2] for three in spread):
        ends = [
            (None, None) if value is None else (three[0], three[2]) if three else (value, value)
            for three, value in zip(spread, values, strict=True)
        ]
        between = ([low for low, _ in ends], [high for _, high in ends])
        if spread and (last := spread[-1]):
            told = f"peers {form(last[0])} to {form(last[2])}"
            worst = worst_peer(held[-1], fleet, name)
            notes = [f"{told}, worst {worst}"] * bool(worst) + [told, *notes]
    return curve_plot(
        name.replace("_", " ").capitalize(),
        values,
        width,
        height,
        color,
        rounds=_round_range(held),
        fmt=form,
        notes=notes,
        spread=between,
    )


def _staleness(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """How many versions the updates of a version were behind: their mean, and least to most."""
    held = [closed for closed in _recent(run) if closed.staleness]
    counts = [list(closed.staleness.values()) for closed in held]
    lows, highs = [float(min(of)) for of in counts], [float(max(of)) for of in counts]
    peer, most = max(held[-1].staleness.items(), key=lambda item: item[1]) if held else ("", 0)
    name = called(fleet.peers[peer]) if peer in fleet.peers else peer
    return curve_plot(
        "Staleness",
        [sum(of) / len(of) for of in counts],
        width,
        height,
        colors().purple,
        rounds=_round_range(held),
        fmt=lambda versions: f"{versions:.1f}",
        notes=[f"{name} is {most} behind", f"{most} at most"] if most else ["nobody is behind"],
        spread=(lows, highs) if lows != highs else None,
    )


def _participation(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """Who gave an update, by peer and round; how many, where there are too many for a line each."""
    own, rounds = colors(), _recent(run)
    refused = sum(closed.refused for closed in run.rounds)
    notes = [f"{refused} refused"] if refused else []
    here = [peer for peer in fleet.peers.values() if peer.standing == "enrolled"]
    strips = {called(peer): participation(peer, run, 60) for peer in here}
    if not any(strip.strip() for strip in strips.values()) or len(here) > height - 1:
        values = [float(closed.peers) for closed in rounds]
        parts = [(own.purple, values)]
        return stack_plot(
            "Peers",
            parts,
            width,
            height,
            rounds=_round_range(rounds),
            fmt=lambda v: f"{v:.0f}",
            notes=notes,
        )
    last = Text(f"{rounds[-1].peers}" if rounds else "", own.purple)
    wide = min(max(map(len, strips)), max(width // 3, 6))
    room = width - wide - 1
    shown = min(max(map(len, strips.values())), room)
    broad = 2 if 2 * shown <= room else 1
    lines = [title_line("Peers", last, notes, width)]
    for name, strip in sorted(strips.items()):
        line = Text(f"{truncate(name, wide):<{wide}} ", own.dim, no_wrap=True)
        for sign in strip[-shown:].rjust(shown):
            color = own.purple if sign == "■" else own.faint
            line.append(sign + " " * (broad - 1), Style(color=color))
        lines.append(line)
    foot = Text(" " * (wide + 1) + str(rounds[-shown].round if rounds else ""), own.dim)
    if rounds and shown > 1:
        end = str(rounds[-1].round)
        foot.append(" " * (wide + 1 + shown * broad - (broad - 1) - len(foot.plain) - len(end)))
        foot.append(end)
    return [*lines, foot][:height]


def _time(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """Seconds of the rounds by what they were spent on, the last one's below in words."""
    own, rounds = colors(), _recent(run)
    names = list(dict.fromkeys(name for closed in rounds for name in closed.spent))
    palette = (own.accent, own.blue, own.purple, own.green, own.yellow, own.vermilion)
    known = [sum(closed.spent.values()) for closed in rounds]
    # What no part tells of: rounds that a restart cut, and time between the parts.
    rest = [max(c.seconds - told, 0.0) for c, told in zip(rounds, known, strict=True)]
    part_colors = [palette[n % len(palette)] for n in range(len(names))]
    parts = [
        (color, [closed.spent.get(name, 0.0) for closed in rounds])
        for name, color in zip(names, part_colors, strict=True)
    ]
    if not names or sum(rest) > 0.05 * sum(closed.seconds for closed in rounds):
        parts.append((own.faint if names else own.accent, rest))
    legend = _legend(rounds[-1] if rounds else None, names, part_colors, width)
    room = height - len(legend)
    if room < 5:
        legend, room = [], height
    plot = stack_plot("Time", parts, width, room, rounds=_round_range(rounds), fmt=duration)
    return [*plot, *legend]


def _legend(
    last: RoundClosed | None, names: list[str], part_colors: list[str], width: int
) -> list[Text]:
    """What the last round's seconds were spent on, in the colours of the bars."""
    lines: list[Text] = []
    for name, color in zip(names, part_colors, strict=True) if last else ():
        assert last is not None
        piece = Text.assemble(
            ("■ ", color), (f"{name} ", colors().dim), duration(last.spent.get(name, 0.0))
        )
        if lines and len(lines[-1].plain) + 2 + len(piece.plain) <= width:
            lines[-1].append("  ").append_text(piece)
        else:
            lines.append(piece)
    return lines


def _norms(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """How far each peer's last update moved the weights."""
    own = colors()
    norms = run.rounds[-1].norms if run.rounds else {}
    if not norms:
        line = Text("not told for the last round", own.dim)
        return [title_line("Update norm by peer", Text(), (), width), line]
    ordered = sorted(norms.items(), key=lambda item: -item[1])
    most = ordered[0][1] or 1.0
    names = {peer: called(fleet.peers[peer]) if peer in fleet.peers else peer for peer in norms}
    rows = [(names[peer], decimal(norm), norm / most) for peer, norm in ordered]
    if len(rows) <= height - 1:
        return bar_list("Update norm by peer", rows, width, own.vermilion)
    # Too many for a line each: from the largest down.
    middle = ordered[len(ordered) // 2][1]
    parts = [(own.vermilion, [norm for _, norm in ordered])]
    plot = stack_plot(
        "Update norm by peer", parts, width, height, rounds=(1, len(ordered)), fmt=brief
    )
    plot[0] = title_line("Update norm by peer", Text(), [f"median {brief(middle)}"], width)
    return plot


def _bytes(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    own, rounds = colors(), _recent(run)
    up = [float(closed.bytes_up) for closed in rounds]
    down = [float(closed.bytes_down) for closed in rounds]
    sums = [sum(c.bytes_up for c in run.rounds), sum(c.bytes_down for c in run.rounds)]
    note = f"↑ {format_bytes(sums[0])} ↓ {format_bytes(sums[1])} in all"
    parts = [(own.yellow, up), (own.blue, down)]
    return stack_plot(
        "Bytes ↑ ↓",
        parts,
        width,
        height,
        rounds=_round_range(rounds),
        fmt=format_bytes,
        notes=[note],
    )
