"""How a run goes back to an earlier version: a damaged one, one that its peers hold, a new start.

Pure; the transitions of these events.
"""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.runs import best_version
from coordinator.runs.state import Round, Run
from coordinator.storage.run_events import (
    Holding,
    HoldingTold,
    RecallBegun,
    RunResumed,
    VersionLost,
    VersionRecalled,
    VersionSought,
)
from protocols.messages.states import RunState


def version_lost(run: Run, event: VersionLost) -> Run:
    """As it was when `to` was the newest: what came after is done again."""
    digests = [closed.digest for closed in run.history]
    kept = run.history[: digests.index(event.to) + 1 if event.to in digests else 0]
    return replace(_back_to(run, kept), head=event.to)


def _back_to(run: Run, kept: tuple[Round, ...]) -> Run:
    """Between two rounds, with these the closed ones."""
    return replace(
        run,
        state=RunState.WAITING,
        round=kept[-1].round if kept else 0,
        head=kept[-1].digest if kept else run.first,
        parent=kept[-2].digest if len(kept) > 1 else run.first if kept else "",
        peers={},
        updates={},
        contributors=(),
        evaluating=False,
        norms={},
        refused=0,
        assignments={},
        buffer=(),
        cooling_down=frozenset(),
        staleness={},
        history=kept,
        best=max(kept, key=lambda one: best_version.score(run.spec, one.metrics), default=None),
        strategy_state=kept[-1].strategy_state if kept else {},
    )


def recall_begun(run: Run, event: RecallBegun) -> Run:
    begun = {"recalling": True, "head_intact": event.whole, "holdings": {}, "target_version": None}
    return replace(_back_to(run, run.history), **begun)


def holding_told(run: Run, event: HoldingTold) -> Run:
    peers = run.peers | {event.peer: "answered"}
    return replace(run, peers=peers, holdings=run.holdings | {event.peer: event.holding})


def version_sought(run: Run, event: VersionSought) -> Run:
    return replace(run, target_version=event.version, peers={})


def version_recalled(run: Run, event: VersionRecalled) -> Run:
    """Rounds after the version are forgotten; those that the ledger never saw are one entry."""
    number, digest = event.version.round, event.version.digest
    kept = tuple(closed for closed in run.history if closed.round <= number)
    if number and (not kept or kept[-1].digest != digest):
        kept = (*(closed for closed in kept if closed.round < number), _unseen(event.version))
    over = {"recalling": False, "holdings": {}, "target_version": None, "ended_because": ""}
    return replace(
        _back_to(run, kept),
        first=run.first if number else digest,
        head=digest,
        strategy_state=event.strategy_state,
        **over,
    )


def _unseen(version: Holding) -> Round:
    """A round that closed after the backup was made: only its version is known."""
    return Round(
        round=version.round,
        digest=version.digest,
        contributors=(),
        refused=0,
        metrics={},
        seconds=0.0,
        bytes_up=0,
        bytes_down=0,
        norms={},
    )


def run_resumed(run: Run, event: RunResumed) -> Run:
    run = replace(run, ended_because="")
    if run.ended_in is RunState.EVALUATING:  # its version is there: only the evaluation is missing
        return replace(run, state=RunState.EVALUATING, evaluating=False)
    return _back_to(run, run.history)
