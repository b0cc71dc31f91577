"""The rounds of a run for tables and plots: cells, trends, a summary, progress. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Fleet, Peer, Run
from coordinator.monitor.peer_table import PARTICIPATION_GLYPHS, Cell, Column, peer_name
from coordinator.remote import formatting as fmt
from protocols.messages.envelope import RoundClosed
from protocols.messages.states import ENDED, RunState


def best_round(run: Run) -> int:
    """The coordinator's best round, else the one with the lowest loss; 0 if there is none."""
    if run.changed.best_round:
        return run.changed.best_round
    losses = [
        (closed.loss, closed.round)
        for closed in run.rounds
        if closed.loss is not None and not closed.diverged
    ]
    return min(losses)[1] if losses else 0


#: Metrics that have a column of their own, or are useless by round.
_OTHER_COLUMNS = frozenset({"loss", "accuracy", "num-examples"})
METRIC_WIDTH = 14
WORST_WIDTH = 14
MAX_GLYPHS = 16


def metric_names(run: Run) -> list[str]:
    """The metrics besides loss and accuracy, in order of appearance."""
    rounds = (run.rounds[0], run.rounds[-1]) if run.rounds else ()
    names = (name for closed in rounds for name in (*closed.metrics, *closed.spread))
    return [name for name in dict.fromkeys(names) if name not in _OTHER_COLUMNS]


def metric_value(closed: RoundClosed, name: str) -> float | None:
    """The loss, the accuracy, the mean of another metric, or else the median of the peers."""
    if name in ("loss", "accuracy"):
        return closed.loss if name == "loss" else closed.accuracy
    value = closed.metrics.get(name)
    return closed.spread[name][1] if value is None and name in closed.spread else value


def base_columns(best: int) -> list[Column[RoundClosed]]:
    """The columns of every run; the round `best` has a star."""

    def number(closed: RoundClosed) -> Cell:
        is_best = closed.round == best
        text = f"{'★ ' if is_best else ''}{closed.round}"
        return Cell(text, "strong" if is_best else "plain")

    def loss(closed: RoundClosed) -> Cell:
        return Cell(fmt.DIVERGED, "bad") if closed.diverged else Cell(fmt.decimal(closed.loss))

    def accuracy(closed: RoundClosed) -> Cell:
        return Cell(fmt.NOTHING if closed.accuracy is None else fmt.percent(closed.accuracy))

    def refused(closed: RoundClosed) -> Cell:
        return Cell(str(closed.refused), "warn") if closed.refused else Cell(fmt.NOTHING, "quiet")

    return [
        _column("Round", 7, number),
        _column("Val loss", 10, loss),
        _column("Accuracy", 8, accuracy),
        _column("Peers", 5, lambda closed: Cell(str(closed.peers))),
        _column("Refused", 7, refused),
        _column("Time", 6, lambda closed: Cell(fmt.duration(closed.seconds))),
        _column("Up", 7, lambda closed: Cell(fmt.format_bytes(closed.bytes_up))),
        _column("Down", 7, lambda closed: Cell(fmt.format_bytes(closed.bytes_down))),
    ]


def round_columns(run: Run, fleet: Fleet) -> list[Column[RoundClosed]]:
    """The columns of `run`: also the worst peer, if it is known, and the task's own metrics."""
    columns = base_columns(best_round(run))
    if any(closed.worst for closed in run.rounds):
        worst = lambda closed: Cell(fmt.truncate(worst_peer(closed, fleet), WORST_WIDTH))  # noqa: E731
        columns.append(_column("Worst", WORST_WIDTH, worst))
    for name in metric_names(run):
        title = fmt.truncate(name.replace("_", " "), METRIC_WIDTH)
        value = partial(lambda name, closed: Cell(fmt.decimal(metric_value(closed, name))), name)
        columns.append(_column(title, max(len(title), 8), value))
    return columns


def _column(title: str, width: int, cell: Callable[[RoundClosed], Cell]) -> Column[RoundClosed]:
    return Column(title, title, width, width, 0, lambda row, now, width: cell(row), right=True)


def worst_peer(closed: RoundClosed, fleet: Fleet, metric: str = "") -> str:
    """The peer with the worst `metric`, or with the first known one; "" if there is none."""
    metrics = (metric,) if metric else ("accuracy", "loss", *closed.worst)
    peer = next((closed.worst[name] for name in metrics if name in closed.worst), "")
    return peer_name(fleet, peer)


def other_runs(fleet: Fleet) -> list[str]:
    """The runs with closed rounds besides the current one, the newest first."""
    current = current_run(fleet)
    others = [run for run in fleet.runs.values() if run is not current and run.rounds]
    others.sort(key=lambda run: -run.changed_at)
    return [run.changed.run for run in others]


def loss_trend(rounds: Iterable[RoundClosed]) -> list[float | None]:
    """The losses of the evaluated rounds; None for a diverged one."""
    return [r.loss for r in rounds if r.loss is not None or r.diverged]


def accuracy_trend(rounds: Iterable[RoundClosed]) -> list[float | None]:
    """The accuracies of the evaluated rounds; None for a diverged one."""
    return [r.accuracy for r in rounds if r.accuracy is not None or r.diverged]


def seconds_left(run: Run) -> float | None:
    """Remaining seconds, from the mean of the last ten rounds; None if not known."""
    changed, last = run.changed, run.rounds[-10:]
    left = changed.rounds - (run.rounds[-1].round if run.rounds else 0)
    if changed.state in ENDED or changed.state is RunState.WAITING or not last or left <= 0:
        return None
    return left * sum(closed.seconds for closed in last) / len(last)


def describe_run(run: Run) -> str:
    """The task, state and progress of a run, and what it waits for."""
    changed = run.changed
    text = f"{changed.task} · {changed.state.value} · round {changed.round}/{changed.rounds}"
    if changed.ended_because:
        return f"{text} · {changed.ended_because}"
    if changed.waiting_for:
        text = f"{text} · waits for {changed.waiting_for}"
    elif changed.asked:
        text = f"{text} · {changed.answered} of {changed.asked} answered"
    if changed.num_refused:
        text = f"{text} · {fmt.plural(changed.num_refused, 'peer')} refused"
    return text


def round_progress(run: Run, width: int) -> str:
    """`▰▰▱▱ 2 of 4`: a glyph for each requested update, at most `MAX_GLYPHS`."""
    changed = run.changed
    if changed.state in ENDED or not changed.asked:
        return ""
    count = f" {changed.answered} of {changed.asked}"
    if len(count) > width:
        return ""
    glyphs = min(changed.asked, max(width - len(count), 0), MAX_GLYPHS)
    done = min(changed.answered * glyphs // changed.asked, glyphs)
    return "▰" * done + "▱" * (glyphs - done) + count


def participation(peer: Peer, run: Run, width: int) -> str:
    """A glyph for each of the last `width` rounds of `run`: `■` where `peer` sent an update."""
    return (
        peer.contributions[-width:].translate(PARTICIPATION_GLYPHS)
        if peer.contributions_run == run.changed.run
        else ""
    )
