"""A run's rounds as the tables and plots show them: cells, trends, words, progress. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.fleet.reducer import Fleet, Peer, Run, called
from coordinator.monitor.peer_table import PARTICIPATION_GLYPHS, Cell
from coordinator.remote.formatting import (
    DIVERGED,
    NOTHING,
    decimal,
    duration,
    format_bytes,
    percent,
)
from protocols.messages.envelope import RoundClosed
from protocols.messages.states import ENDED, RunState


def best_round(run: Run) -> int:
    """The number of the best round: what the coordinator says, else the lowest loss; 0 for none."""
    if run.changed.best_round:
        return run.changed.best_round
    losses = [
        (closed.loss, closed.round)
        for closed in run.rounds
        if closed.loss is not None and not closed.diverged
    ]
    return min(losses)[1] if losses else 0


#: Metrics that have a column of their own, or say nothing by round.
_NAMED = frozenset({"loss", "accuracy", "num-examples"})
METRIC_WIDTH = 14
WORST_WIDTH = 14
MAX_GLYPHS = 16


def metric_names(run: Run) -> list[str]:
    """What else the rounds tell than loss and accuracy, in the order in which it came up."""
    rounds = (run.rounds[0], run.rounds[-1]) if run.rounds else ()
    told = (name for closed in rounds for name in (*closed.metrics, *closed.spread))
    return [name for name in dict.fromkeys(told) if name not in _NAMED]


ROUND_TITLES: tuple[tuple[str, int], ...] = (
    ("Round", 7),
    ("Val loss", 10),
    ("Accuracy", 8),
    ("Peers", 5),
    ("Refused", 7),
    ("Time", 6),
    ("Up", 7),
    ("Down", 7),
)


def round_cells(closed: RoundClosed, best: int) -> list[Cell]:
    """One line of the table of rounds, as `ROUND_TITLES`; the best round has a star."""
    star = closed.round == best
    loss = Cell(DIVERGED, "bad") if closed.diverged else Cell(decimal(closed.loss))
    return [
        Cell(f"{'★ ' if star else ''}{closed.round}", "strong" if star else "plain"),
        loss,
        Cell(NOTHING if closed.accuracy is None else percent(closed.accuracy)),
        Cell(str(closed.peers)),
        Cell(
            str(closed.refused) if closed.refused else NOTHING,
            "warn" if closed.refused else "quiet",
        ),
        Cell(duration(closed.seconds)),
        Cell(format_bytes(closed.bytes_up)),
        Cell(format_bytes(closed.bytes_down)),
    ]


def worst_peer(closed: RoundClosed, fleet: Fleet, metric: str = "") -> str:
    """Who was served worst by the round's version, by `metric` or the first that tells; else ""."""
    metrics = (metric,) if metric else ("accuracy", "loss", *closed.worst)
    peer = next((closed.worst[name] for name in metrics if name in closed.worst), "")
    return called(fleet.peers[peer]) if peer in fleet.peers else peer


def metric_cells(closed: RoundClosed, names: Iterable[str]) -> list[Cell]:
    """The round's values of the metrics `names`; the median of the peers where no mean is told."""
    medians = {name: three[1] for name, three in closed.spread.items()}
    return [Cell(decimal(closed.metrics.get(name, medians.get(name)))) for name in names]


def loss_trend(rounds: Iterable[RoundClosed]) -> list[float | None]:
    """The losses of the rounds that were evaluated; None where one diverged."""
    return [r.loss for r in rounds if r.loss is not None or r.diverged]


def accuracy_trend(rounds: Iterable[RoundClosed]) -> list[float | None]:
    """The accuracies of the rounds that were evaluated; None where the loss diverged."""
    return [r.accuracy for r in rounds if r.accuracy is not None or r.diverged]


def seconds_left(run: Run) -> float | None:
    """How long the run will take, if its rounds go on as the last ten did; None if not known."""
    changed, last = run.changed, run.rounds[-10:]
    left = changed.rounds - (run.rounds[-1].round if run.rounds else 0)
    if changed.state in ENDED or changed.state is RunState.WAITING or not last or left <= 0:
        return None
    return left * sum(closed.seconds for closed in last) / len(last)


def describe_run(run: Run) -> str:
    """What the run is doing or waits for, in one sentence."""
    changed = run.changed
    text = f"{changed.task} · {changed.state.value} · round {changed.round}/{changed.rounds}"
    if changed.ended_because:
        return f"{text} · {changed.ended_because}"
    if changed.waiting_for:
        text = f"{text} · waits for {changed.waiting_for}"
    elif changed.asked:
        text = f"{text} · {changed.answered} of {changed.asked} answered"
    return text


def round_progress(run: Run, width: int) -> str:
    """The round at a glance: `▰▰▱▱ 2 of 4`, a sign for each peer that was asked, or a bar."""
    changed = run.changed
    if changed.state in ENDED or not changed.asked:
        return ""
    count = f" {changed.answered} of {changed.asked}"
    if len(count) > width:
        return ""
    signs = min(changed.asked, max(width - len(count), 0), MAX_GLYPHS)
    done = min(changed.answered * signs // changed.asked, signs)
    return "▰" * done + "▱" * (signs - done) + count


def participation(peer: Peer, run: Run, width: int) -> str:
    """A sign for each of the last rounds of `run`, at most `width`: `■` where it gave an update."""
    return (
        peer.given[-width:].translate(PARTICIPATION_GLYPHS)
        if peer.given_run == run.changed.run
        else ""
    )
