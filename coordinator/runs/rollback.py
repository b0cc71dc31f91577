"""Transitions that return a run to an earlier version. Pure.

The newest version is damaged, the run's versions come back from its peers, or the run is resumed.
"""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.runs import best_version
from coordinator.runs.secure import transitions as secure
from coordinator.runs.state import Round, Run
from coordinator.storage import run_events as events
from protocols.messages.states import RunState


def version_lost(run: Run, event: events.VersionLost) -> Run:
    """Return to the time when `to` was the newest version. Later rounds are repeated."""
    digests = [closed.digest for closed in run.history]
    kept = run.history[: digests.index(event.to) + 1 if event.to in digests else 0]
    return replace(_back_to(run, kept), head=event.to)


def _back_to(run: Run, kept: tuple[Round, ...]) -> Run:
    """The run between two rounds, after these closed ones."""
    return replace(
        run,
        state=RunState.WAITING,
        round=kept[-1].round if kept else 0,
        head=kept[-1].digest if kept else run.first,
        parent=kept[-2].digest if len(kept) > 1 else run.first if kept else "",
        peers={},
        updates={},
        contributors=(),
        on_time=(),
        evaluating=False,
        norms={},
        refused=0,
        assignments={},
        buffer=(),
        cooling_down=frozenset(),
        staleness={},
        history=kept,
        evaluations={
            peer: one
            for peer, one in run.evaluations.items()
            if one.round <= (kept[-1].round if kept else 0)
        },
        abandoned=(*run.abandoned, *_undone(run, kept)),
        best=best_version.best(run.spec, kept),
        strategy_state=kept[-1].strategy_state if kept else {},
        cohort=None,
        turn=secure.next_turn(run),
    )


def _undone(run: Run, kept: tuple[Round, ...]) -> list[Round]:
    """The rounds with files on disk that are not among `kept`. The last may not be closed."""
    last = Round(round=run.round, digest=run.head, strategy_state=run.strategy_state)
    stored = (*run.history[-run.spec.keep_versions :], *([run.best] if run.best else []), last)
    digests = {run.first, *(closed.digest for closed in kept)}
    return [one for one in stored if one.digest and one.digest not in digests]


def recall_begun(run: Run, event: events.RecallBegun) -> Run:
    return replace(
        _back_to(run, run.history),
        turn=secure.turn_after_restore(run),
        recalling=True,
        head_intact=event.whole,
        holdings={},
        target_version=None,
    )


def holding_told(run: Run, event: events.HoldingTold) -> Run:
    return replace(
        run,
        peers=run.peers | {event.peer: "answered"},
        holdings=run.holdings | {event.peer: event.holding},
    )


def version_recalled(run: Run, event: events.VersionRecalled) -> Run:
    """Drop the rounds after the version. A round that the ledger lacks is added without details."""
    number, digest = event.version.round, event.version.digest
    kept = tuple(closed for closed in run.history if closed.round <= number)
    if number and (not kept or kept[-1].digest != digest):
        kept = (*(closed for closed in kept if closed.round < number), _unseen(event.version))
    # Peers have the versions that the ledger lacks, so what these cost is spent.
    unseen = max(0, number - (run.history[-1].round if run.history else run.spec.first_round - 1))
    return replace(
        _back_to(run, kept),
        num_spent=run.num_spent + (unseen if run.spec.private_versions else 0),
        first=run.first if number else digest,
        head=digest,
        strategy_state=event.strategy_state,
        recalling=False,
        holdings={},
        target_version=None,
        ended_because="",
    )


def _unseen(version: events.Holding) -> Round:
    """A round that closed after the backup was made. Only its version is known."""
    return Round(round=version.round, digest=version.digest)


def run_resumed(run: Run, event: events.RunResumed) -> Run:
    run = replace(run, ended_because="", comparisons={})
    if run.ended_in is RunState.EVALUATING:  # the version exists, only its evaluation is missing
        turn = secure.next_turn(run)
        return replace(run, state=RunState.EVALUATING, evaluating=False, turn=turn)
    return _back_to(run, run.history)
