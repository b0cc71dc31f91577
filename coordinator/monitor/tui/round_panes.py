"""The plots of a run, each as lines of text: metrics, participation, time, norms, bytes.

Every metric of a task or strategy gets a plot; no list of known metrics is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.style import Style
from rich.text import Text

from coordinator.fleet.readings import display_name
from coordinator.fleet.state import Fleet, Run
from coordinator.monitor import round_table
from coordinator.monitor.charts import Values
from coordinator.monitor.evaluations import Evaluations, format_metric, main_metric, worst_first
from coordinator.monitor.peer_table import peer_name
from coordinator.monitor.tui.plots import (
    Behind,
    Plot,
    bar_list,
    curve_plot,
    ranked_list,
    stack_plot,
)
from coordinator.monitor.tui.theme import colors
from coordinator.remote.formatting import brief, decimal, duration, format_bytes, percent, truncate
from protocols.messages.envelope import RoundClosed

MAX_ROUNDS = 500
#: The lines of a plot of this width and height.
Pane = Callable[[int, int], list[Text]]


def panes(
    run: Run, fleet: Fleet, compared: str = "", evaluations: Evaluations | None = None
) -> list[Pane]:
    """Every plot of `run`, the most important first; metrics before those of the run `compared`.

    `evaluations` are those of single peers.
    """
    other = fleet.runs.get(compared)
    names = ("loss", "accuracy", *round_table.metric_names(run))
    evaluations = evaluations or Evaluations()
    if evaluations.run != run.changed.run:
        evaluations = Evaluations()
    why = evaluations.withheld if run.rounds else ""
    loss, accuracy, *others = (
        partial(_metric, name, run=run, fleet=fleet, other=other, why=why) for name in names
    )
    plots: list[Callable[..., list[Text]]] = [_participation, _time, _norms, _bytes]
    if any(closed.staleness for closed in run.rounds):
        plots.insert(0, _staleness)
    if evaluations.by_peer:
        plots.insert(0, partial(_held_out, found=evaluations))
    return [loss, accuracy, *(partial(plot, run=run, fleet=fleet) for plot in plots), *others]


def _recent(run: Run) -> list[RoundClosed]:
    return run.rounds[-MAX_ROUNDS:]


def _round_range(rounds: list[RoundClosed]) -> tuple[int, int]:
    return (rounds[0].round, rounds[-1].round) if rounds else (0, 0)


def _metric(
    name: str,
    width: int,
    height: int,
    *,
    run: Run,
    fleet: Fleet,
    other: Run | None = None,
    why: str = "",
) -> list[Text]:
    """The mean of all peers, weighted by examples; the range of the peers is shaded.

    `other` is drawn dotted behind it, on the same axis of rounds. `why` there is no metric.
    """
    own = colors()
    fmt = percent if name == "accuracy" else brief
    rounds = _evaluated(run, name)
    values = [round_table.metric_value(closed, name) for closed in rounds]
    spreads = [closed.spread.get(name) for closed in rounds]
    spread: tuple[Values, Values] | None = None
    notes: list[str] = []
    best = next((closed for closed in rounds if closed.round == round_table.best_round(run)), None)
    if best is not None and (at_best := round_table.metric_value(best, name)) is not None:
        notes = [f"★ {fmt(at_best)} in {best.round}", f"★ {fmt(at_best)}"]
    if any(three and three[0] < three[2] for three in spreads):
        ends = [
            (None, None) if value is None else (three[0], three[2]) if three else (value, value)
            for three, value in zip(spreads, values, strict=True)
        ]
        spread = ([low for low, _ in ends], [high for _, high in ends])
        if last := spreads[-1]:
            text = f"peers {fmt(last[0])} to {fmt(last[2])}"
            worst = round_table.worst_peer(rounds[-1], fleet, name)
            notes = [f"{text}, worst {worst}"] * bool(worst) + [text, *notes]
    title = name.replace("_", " ").capitalize()
    color = {"loss": own.blue, "accuracy": own.green}.get(name, own.accent)
    first, last_round = _round_range(rounds)
    behind, share = None, 1.0
    if other is not None and (compared := _evaluated(other, name)):
        others = [round_table.metric_value(closed, name) for closed in compared]
        longest = max(len(values), len(others))
        behind = Behind(others, own.purple, len(others) / longest)
        share = len(values) / longest
        last_round = max(last_round, compared[-1].round)
        end = others[-1]
        text = f"┄ {fmt(end)}" if end is not None else "┄"
        notes = [f"{text} {other.changed.run} (dotted)", f"{text} {other.changed.run}", text]
    nothing = why or ("no round has this metric" if run.rounds else "no round closed yet")
    plot = Plot(title, width, height, (first, last_round), fmt, notes, nothing)
    return curve_plot(plot, values, color, spread, behind, share)


def _evaluated(run: Run, name: str) -> list[RoundClosed]:
    """The recent rounds that have this metric, or that diverged."""
    return [
        closed
        for closed in _recent(run)
        if round_table.metric_value(closed, name) is not None or closed.diverged
    ]


def _held_out(width: int, height: int, *, run: Run, fleet: Fleet, found: Evaluations) -> list[Text]:
    """How each peer last evaluated the model, the worst first."""
    metric = main_metric(found)
    rows = worst_first(found, metric)
    most = max((abs(value) for _, value in rows if value is not None), default=0.0) or 1.0
    bars = [
        (
            *(peer_name(fleet, peer), "✕" if value is None else format_metric(metric, value)),
            abs(value or 0.0) / most,
        )
        for peer, value in rows
    ]
    numbers = {one.round for one in found.by_peer.values()}
    newest = f"round {max(numbers)}"
    notes = [newest if len(numbers) == 1 else f"round {min(numbers)} to {max(numbers)}", newest]
    plot = Plot(f"Held-out {metric} by peer", width, height, notes=notes)
    return ranked_list(plot, bars, colors().green)


def _staleness(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """How many versions old the updates were: mean and range."""
    rounds = [closed for closed in _recent(run) if closed.staleness]
    counts = [list(closed.staleness.values()) for closed in rounds]
    lows, highs = [float(min(of)) for of in counts], [float(max(of)) for of in counts]
    last = rounds[-1].staleness if rounds else {"": 0}
    peer, most = max(last.items(), key=lambda item: item[1])
    worst = f"{peer_name(fleet, peer)} is {most} behind"
    notes = [worst, f"{most} at most"] if most else ["no peer is behind"]
    plot = Plot("Staleness", width, height, _round_range(rounds), "{:.1f}".format, notes)
    means = [sum(of) / len(of) for of in counts]
    return curve_plot(plot, means, colors().purple, (lows, highs) if lows != highs else None)


def _participation(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """Who sent an update in which round; only their number if there are too many peers."""
    own, rounds = colors(), _recent(run)
    refused = sum(closed.refused for closed in run.rounds)
    notes = [f"{refused} refused"] if refused else []
    plot = Plot("Peers", width, height, _round_range(rounds), "{:.0f}".format, notes)
    enrolled = [peer for peer in fleet.peers.values() if peer.standing == "enrolled"]
    strips = {display_name(peer): round_table.participation(peer, run, 60) for peer in enrolled}
    if not any(strip.strip() for strip in strips.values()) or len(enrolled) > height - 1:
        return stack_plot(plot, [(own.purple, [float(closed.peers) for closed in rounds])])
    wide = min(max(map(len, strips)), max(width // 3, 6))
    room = width - wide - 1
    shown = min(max(map(len, strips.values())), room)
    pitch = 2 if 2 * shown <= room else 1
    lines = [plot.title_line(Text(f"{rounds[-1].peers}" if rounds else "", own.purple))]
    for name, strip in sorted(strips.items()):
        line = Text(f"{truncate(name, wide):<{wide}} ", own.dim, no_wrap=True)
        for glyph in strip[-shown:].rjust(shown):
            color = own.purple if glyph == "■" else own.faint
            line.append(glyph + " " * (pitch - 1), Style(color=color))
        lines.append(line)
    axis = Text(" " * (wide + 1) + str(rounds[-shown].round if rounds else ""), own.dim)
    if rounds and shown > 1:
        end = str(rounds[-1].round)
        axis.append(" " * (wide + 1 + shown * pitch - (pitch - 1) - len(axis) - len(end)) + end)
    return [*lines, axis][:height]


def _time(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """Seconds by phase, with a legend of the last round."""
    own, rounds = colors(), _recent(run)
    names = list(dict.fromkeys(name for closed in rounds for name in closed.spent))
    palette = (own.accent, own.blue, own.purple, own.green, own.yellow, own.vermilion)
    part_colors = [palette[n % len(palette)] for n in range(len(names))]
    parts = [
        (color, [closed.spent.get(name, 0.0) for closed in rounds])
        for name, color in zip(names, part_colors, strict=True)
    ]
    # Seconds outside of any phase: rounds that a restart interrupted, and gaps between phases.
    rest = [max(closed.seconds - sum(closed.spent.values()), 0.0) for closed in rounds]
    if not names or sum(rest) > 0.05 * sum(closed.seconds for closed in rounds):
        parts.append((own.faint if names else own.accent, rest))
    legend = _legend(rounds[-1].spent, names, part_colors, width) if rounds else []
    if height - len(legend) < 5:
        legend = []
    plot = Plot("Time", width, height - len(legend), _round_range(rounds), duration)
    return [*stack_plot(plot, parts), *legend]


def _legend(
    spent: dict[str, float], names: list[str], part_colors: list[str], width: int
) -> list[Text]:
    """The seconds of each phase, in the colors of the bars."""
    lines: list[Text] = []
    for name, color in zip(names, part_colors, strict=True):
        entry = Text.assemble(("■ ", color), (f"{name} ", colors().dim))
        entry.append(duration(spent.get(name, 0.0)))
        if lines and len(lines[-1]) + 2 + len(entry) <= width:
            lines[-1].append("  ").append_text(entry)
        else:
            lines.append(entry)
    return lines


def _norms(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    """The norm of each peer's last update."""
    color = colors().vermilion
    norms = run.rounds[-1].norms if run.rounds else {}
    plot = Plot("Update norm by peer", width, height, (1, len(norms)))
    if not norms:
        return [plot.title_line(), Text("not known for the last round", colors().dim)]
    ordered = sorted(norms.items(), key=lambda item: -item[1])
    most = ordered[0][1] or 1.0
    if len(ordered) <= height - 1:
        rows = [(peer_name(fleet, peer), decimal(norm), norm / most) for peer, norm in ordered]
        return bar_list(plot, rows, color)
    lines = stack_plot(plot, [(color, [norm for _, norm in ordered])])
    median = ordered[len(ordered) // 2][1]
    return [plot._replace(notes=[f"median {brief(median)}"]).title_line(), *lines[1:]]


def _bytes(width: int, height: int, *, run: Run, fleet: Fleet) -> list[Text]:
    own, rounds = colors(), _recent(run)
    up = sum(closed.bytes_up for closed in run.rounds)
    down = sum(closed.bytes_down for closed in run.rounds)
    notes = [f"↑ {format_bytes(up)} ↓ {format_bytes(down)} in total"]
    plot = Plot("Bytes ↑ ↓", width, height, _round_range(rounds), format_bytes, notes)
    ups = (own.yellow, [float(closed.bytes_up) for closed in rounds])
    downs = (own.blue, [float(closed.bytes_down) for closed in rounds])
    return stack_plot(plot, [ups, downs])
