"""Transitions that return a run to an earlier version, or to first weights. Pure.

The newest version is damaged, the run's versions come back from its peers, the run is resumed, or
it begins another model.
"""

from __future__ import annotations

from typing import cast

from msgspec.structs import replace

from coordinator.runs import best_version
from coordinator.runs.secure import transitions as secure
from coordinator.runs.state import Candidate, Round, Run, Standing
from coordinator.storage import run_events as events
from protocols.messages.states import RunState
from protocols.tables.model_scores import MODELS, Model


def version_lost(run: Run, event: events.VersionLost) -> Run:
    """Return to the time when `to` was the newest version. Later rounds are repeated."""
    digests = [closed.digest for closed in run.history]
    own = len(run.history) - len(run.own_rounds)  # those of earlier models stay
    kept = run.history[: max(own, digests.index(event.to) + 1 if event.to in digests else 0)]
    return replace(back_to(run, kept), head=event.to)


def back_to(run: Run, kept: tuple[Round, ...]) -> Run:
    """The run between two rounds, after these closed ones."""
    run = replace(run, history=kept, abandoned=(*run.abandoned, *_undone(run, kept)))
    own, number = run.own_rounds, kept[-1].round if kept else 0
    standing = best_version.standing(run.spec, own)
    return replace(
        run,
        state=RunState.WAITING,
        round=max(number, run.begun),
        head=own[-1].digest if own else run.first,
        parent=own[-2].digest if len(own) > 1 else run.first if own else "",
        peers={},
        updates={},
        contributors=(),
        on_time=(),
        late={},
        evaluating=False,
        norms={},
        refused=0,
        assignments={},
        buffer=(),
        cooling_down=frozenset(),
        staleness={},
        evaluations={peer: one for peer, one in run.evaluations.items() if one.round <= number},
        standing=standing,
        best=best_of(run, standing),
        strategy_state=own[-1].strategy_state if own else {},
        cohort=None,
        turn=secure.next_turn(run),
    )


def best_of(run: Run, standing: Standing) -> Round | None:
    """The best version of the run, if its present model has this standing."""
    common = run.ordered or run.spec
    return best_version.of_models(common, [*(one.standing for one in run.trained), standing])


def _undone(run: Run, kept: tuple[Round, ...]) -> list[Round]:
    """The rounds with files on disk that are not among `kept`. The last may not be closed."""
    last = Round(round=run.round, digest=run.head, strategy_state=run.strategy_state)
    stored = (*run.history[-run.spec.keep_versions :], *([run.best] if run.best else []), last)
    digests = {run.first, *(closed.digest for closed in kept)}
    return [one for one in stored if one.digest and one.digest not in digests]


def recall_begun(run: Run, event: events.RecallBegun) -> Run:
    return replace(
        back_to(run, run.history),
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
    before = run.history[: len(run.history) - len(run.own_rounds)]
    kept = tuple(closed for closed in run.own_rounds if closed.round <= number)
    if number > run.begun and (not kept or kept[-1].digest != digest):
        kept = (*(closed for closed in kept if closed.round < number), _unseen(event.version))
    # Peers have the versions that the ledger lacks, so what these cost is spent.
    unseen = max(0, number - (run.history[-1].round if run.history else run.spec.first_round - 1))
    return replace(
        back_to(run, (*before, *kept)),
        num_spent=run.num_spent + (unseen if run.spec.private_versions else 0),
        first=run.first if number > run.begun else digest,
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


def present(run: Run) -> Candidate:
    """The model that the run trains, or has trained last."""
    return Candidate(
        model=cast(Model, run.spec.settings.get("model", MODELS[0])),
        spec=run.spec,
        first=run.first,
        card=run.card,
        standing=run.standing,
    )


def model_begun(run: Run, event: events.ModelBegun) -> Run:
    """Begin another model, after the rounds of those before it; or the same one without a round."""
    is_again = run.spec.settings.get("model") == event.model
    before = replace(present(run), because=event.because)
    kept = run.history[: len(run.history) - len(run.own_rounds)] if is_again else run.history
    turn, abandoned = run.turn, (*run.abandoned, *_undone(run, kept))
    run = replace(
        run,
        trained=run.trained if is_again else (*run.trained, before),
        upcoming=tuple(model for model in run.upcoming if model != event.model),
        spec=event.spec,
        history=kept,
        first="",
        card=None,
        described={},
        training_seconds={},
    )
    # Its rounds have numbers of their own, so the turns of secure sums continue unchanged.
    return replace(back_to(run, kept), abandoned=abandoned, turn=turn, recalling=False, holdings={})


def run_resumed(run: Run, event: events.RunResumed) -> Run:
    run = replace(run, ended_because="", comparisons={})
    if run.ended_in is RunState.EVALUATING:  # the version exists, only its evaluation is missing
        turn = secure.next_turn(run)
        return replace(run, state=RunState.EVALUATING, evaluating=False, turn=turn)
    return back_to(run, run.history)
