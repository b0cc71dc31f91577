"""A run and its rounds in words, for `commonweight run`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.fleet.state import Peer
    from coordinator.runs.state import Round, Run


def round_line(run: Run, closed: Round) -> str:
    """A closed round: metrics, peers, seconds, megabytes."""
    metrics = " ".join(
        f"{name} {value:.4f}" for name, value in closed.metrics.items() if value is not None
    )
    behind = f"staleness ≤ {max(closed.staleness.values())} " if closed.staleness else ""
    return (
        f"round {closed.round}/{run.spec.rounds} {metrics} {behind}"
        f"peers {len(closed.contributors)} {closed.seconds:.2f} s "
        f"up {closed.bytes_up / 1e6:.2f} MB down {closed.bytes_down / 1e6:.2f} MB"
    )


class Progress:
    """Finds what is new about a run each time that it is looked at."""

    def __init__(self) -> None:
        self._rounds = self._refusals = 0

    def lines(self, run: Run, peers: Callable[[], Mapping[str, Peer]]) -> Iterator[str]:
        """The last refusal, if there were any since the last call, then each newly closed round.

        `peers` is called only if a name is needed.
        """
        if run.refusals > self._refusals:
            yield refusal(run, peers())
        for closed in run.history[self._rounds :]:
            yield round_line(run, closed)
        self._rounds, self._refusals = len(run.history), run.refusals


def best(run: Run) -> str:
    """The best round so far and its metric; a dash if there is none."""
    from coordinator.runs import best_version

    if run.best is None:
        return "–"
    name = best_version.metric_of(run.spec, run.best.metrics)
    value = run.best.metrics.get(name)
    figure = f" {name} {value:.4f}" if value is not None else ""
    return f"round {run.best.round}{figure}"


def refusal(run: Run, peers: Mapping[str, Peer]) -> str:
    """Whom the run refused last, and why; how often it has refused anything."""
    from coordinator.fleet.reducer import called

    peer = run.last_refused
    who = called(peers[peer]) if peer in peers else peer
    often = "" if run.refusals == 1 else f" ({run.refusals} refusals so far)"
    return f"refused {who}: {run.last_refusal}{often}"


def buffer_lines(run: Run, peers: Mapping[str, Peer]) -> list[str]:
    """Who is left out, and of a buffered run its settings and how far behind each peer is."""
    from coordinator.fleet.reducer import called
    from coordinator.runs import buffered

    def name(peer: str) -> str:
        return called(peers[peer]) if peer in peers else peer

    spec = run.spec
    lines = [
        f"{name(peer)} is left out: too few examples; {spec.min_examples} at least"
        for peer in sorted(run.excluded)
    ]
    if not run.buffered:
        return lines
    lines.append(
        f"buffered: {spec.buffer} updates a version, at most {spec.max_staleness} versions behind, "
        f"{spec.concurrency or 'all'} peers at a time, server learning rate {spec.server_lr:g}"
    )
    behind = {name(peer): buffered.staleness(run, given) for peer, given in run.assignments.items()}
    if behind:
        told = ", ".join(f"{who} {count}" for who, count in sorted(behind.items()))
        lines.append(f"at work, versions behind: {told}")
    return lines


def fairness(closed: Round, peers: Mapping[str, Peer]) -> list[str]:
    """By metric: whom the version serves worst, and how far apart the peers are."""
    from coordinator.fleet.reducer import called

    lines = []
    for name, (least, median, most) in sorted(closed.spread.items()):
        peer = closed.worst.get(name, "")
        who = called(peers[peer]) if peer in peers else peer
        lines.append(
            f"round {closed.round}: {name} {least:.4f} … {median:.4f} … {most:.4f} over the peers"
            + (f"; worst: {who}" if who else "")
        )
    return lines


def deadline(run: Run) -> str:
    """The present round's deadline."""
    from coordinator.runs.decisions import phase_deadline_s

    word = "auto, now " if run.spec.deadline == "auto" else ""
    return f"{word}{phase_deadline_s(run):g} s"
