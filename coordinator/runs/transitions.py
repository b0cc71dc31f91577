"""A run as a pure state machine: events in, its state out. No I/O, no clock.

Rule 1. The state of a run is the fold of its events (`apply`); the ledger holds nothing else.
Rule 2. `decisions.decide(run, observed)` says what to do next. Doing it gives new events, and
        events have no other source.
Rule 3. What is observed (who is online, has the deadline passed) may change a decision, never the
        state: replaying the ledger gives the same state, digest for digest.

    waiting ──RoundOpened──> training ──TrainingClosed──> aggregating
       ^                                                       │ VersionCommitted
       └───────────RoundClosed─────────── evaluating <─────────┘
    secure runs have more events while they aggregate and evaluate: `secure.transitions`
    rounds of Flower apps may close without a version: `apps.round_events`
    any ──ModelBegun──> waiting, for the first weights of another model (`runs.candidates`)
    any ──RecallBegun──> waiting, until VersionRecalled
    any ──RunEnded──> finished | stopped | failed        stopped, failed ──RunResumed──> waiting
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from coordinator.runs import best_version, rollback
from coordinator.runs import reply_transitions as replies
from coordinator.runs.secure import transitions as secure
from coordinator.runs.state import Assignment, Evaluation, Round, Run
from coordinator.storage import run_events as events
from coordinator.storage.run_events import RunEvent, Update
from protocols.messages.states import ENDED, RunState


def _round_opened(run: Run, event: events.RoundOpened) -> Run:
    return replace(
        run,
        state=RunState.TRAINING,
        round=event.round,
        parent=event.base,
        num_eligible=event.eligible or len(event.asked),
        num_asked=len(event.asked),
        peers=dict.fromkeys(event.asked, "asked"),
        updates={},
        contributors=(),
        on_time=(),
        late={p: number for p, number in run.late.items() if p not in event.asked},
        norms={},
        refused=0,
        cohort=None,
        lost_cohorts=0,
    )


def _work_given(run: Run, event: events.WorkGiven) -> Run:
    assignment = {event.peer: Assignment(event.round, event.base, event.turn)}
    return replace(
        run,
        assignments=run.assignments | assignment,
        last_assignments=run.last_assignments | assignment,
        cooling_down=run.cooling_down - {event.peer},
    )


def _peer_lost(run: Run, event: events.PeerLost) -> Run:
    if (assignment := run.assignments.get(event.peer)) is not None:
        lost = {event.peer: replace(assignment, lost=True)}
        run = replace(run, assignments=run.assignments | lost)
    if run.peers.get(event.peer) != "asked":
        return run
    return replace(run, peers=run.peers | {event.peer: "lost"})


def _training_closed(run: Run, event: events.TrainingClosed) -> Run:
    staleness: dict[str, int] = {}
    for peer, update in ((accepted.peer, accepted.update) for accepted in run.buffer):
        staleness[peer] = max(staleness.get(peer, 0), update.staleness)
    return replace(
        run,
        state=RunState.AGGREGATING,
        contributors=event.contributors,
        num_examples=sum(
            run.updates[p].num_examples for p in event.contributors if p in run.updates
        ),
        norms={accepted.peer: accepted.update.norm for accepted in run.buffer} | run.norms,
        staleness=staleness,
        on_time=tuple(sorted(run.updates)),
        late=run.late | _unanswered(run) if run.folds_late else {},
    )


def _unanswered(run: Run) -> dict[str, int]:
    """The peers that have not answered in the open round, with its number."""
    return {p: run.round for p, status in run.peers.items() if status in ("asked", "lost")}


def _version_committed(run: Run, event: events.VersionCommitted) -> Run:
    return replace(
        run,
        state=RunState.EVALUATING,
        head=event.digest,
        strategy_state=event.strategy_state,
        limited=run.limited | event.limited.keys(),
        limited_now=event.limited,
        peers={},
        updates={},
        buffer=(),
        cooling_down=frozenset(),
        cohort=None,
    )


def _spread(updates: Mapping[str, Update]) -> dict[str, tuple[float, float, float]]:
    values: dict[str, list[float]] = {}
    for update in updates.values():
        for name, value in update.metrics.items():
            if value is not None and math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: (min(vs), statistics.median(vs), max(vs)) for name, vs in values.items()}


def _round_closed(run: Run, event: events.RoundClosed) -> Run:
    evaluated = run.updates if run.evaluating else {}
    closed = Round(
        round=run.round,
        digest=run.head,
        contributors=run.contributors,
        refused=run.refused,
        metrics=event.metrics,
        seconds=event.seconds,
        bytes_up=event.bytes_up,
        bytes_down=event.bytes_down,
        norms=run.norms,
        strategy_state=run.strategy_state,
        spread=_spread(evaluated),
        worst=best_version.worst_peers(evaluated),
        tallies=event.tallies,
        spent=event.spent,
        staleness=run.staleness,
        num_examples=run.num_examples,
        num_evaluated=sum(update.num_examples for update in evaluated.values()),
        limited=run.limited_now,
        decisive=event.decisive,
        on_time=run.on_time,
    )
    evaluations = {
        peer: Evaluation(run.round, update.num_examples, update.metrics)
        for peer, update in evaluated.items()
        if not run.spec.secure  # the metrics of single peers are not known
    }
    standing = best_version.after(run.spec, run.standing, closed)
    return replace(
        run,
        state=RunState.WAITING,
        evaluating=False,
        peers={},
        updates={},
        cohort=None,
        evaluations=run.evaluations | evaluations,
        history=(*run.history, closed),
        standing=standing,
        best=rollback.best_of(run, standing),
    )


def _run_ended(run: Run, event: events.RunEnded) -> Run:
    return replace(
        run,
        state=event.state,
        ended_in=run.state,
        ended_because=event.because,
        peers={},
        updates={},
        assignments={},
        buffer=(),
        cohort=None,
    )


_WAITING = frozenset({RunState.WAITING})
_OPEN = frozenset({RunState.TRAINING, RunState.EVALUATING})
_NOT_ENDED = frozenset(RunState) - ENDED
_SUMMING = frozenset({RunState.AGGREGATING, RunState.EVALUATING})

#: By event: the states in which it has an effect, and that effect.
TRANSITIONS: dict[type[RunEvent], tuple[frozenset[RunState], Callable[..., Run]]] = {
    events.PeerDescribed: (
        _WAITING,
        replies.peer_described,
    ),
    events.PreprocessingFixed: (
        _WAITING,
        lambda run, event: replace(run, preprocessing=event.text, peers={}, described={}),
    ),
    events.ModelsCompared: (_WAITING, replies.models_compared),
    events.ScoresMissing: (_WAITING, replies.scores_missing),
    events.ModelChosen: (
        _WAITING,
        lambda run, event: replace(
            run,
            ordered=run.spec if event.then else None,
            spec=event.spec,
            choice=event,
            upcoming=event.then,
            peers={},
            scores={},
            scores_missing={},
        ),
    ),
    events.ModelBegun: (_NOT_ENDED, rollback.model_begun),
    events.SchemaAgreed: (
        _WAITING,
        lambda run, event: replace(run, card=event.card, peers={}, described={}),
    ),
    events.WeightsInitialised: (
        _WAITING,
        lambda run, event: replace(run, first=event.digest, head=event.digest, peers={}),
    ),
    events.RoundOpened: (_WAITING, _round_opened),
    events.WorkGiven: (_OPEN, _work_given),
    events.PeersAsked: (
        _OPEN | _WAITING,
        lambda run, event: replace(run, peers=run.peers | dict.fromkeys(event.peers, "asked")),
    ),
    events.PeerLost: (_OPEN | _WAITING, _peer_lost),
    events.UpdateAccepted: (_OPEN | _WAITING, replies.update_accepted),
    events.UpdateRefused: (_NOT_ENDED, replies.update_refused),
    events.TrainingClosed: (frozenset({RunState.TRAINING}), _training_closed),
    events.PrivacySpent: (
        frozenset({RunState.AGGREGATING}),
        lambda run, _: replace(run, num_spent=run.num_spent + 1),
    ),
    events.CohortFixed: (_SUMMING, secure.cohort_fixed),
    events.SharersFixed: (_SUMMING, secure.sharers_fixed),
    events.MaskedUpdateAccepted: (_SUMMING, secure.masked_update_accepted),
    events.SurvivorsFixed: (_SUMMING, secure.survivors_fixed),
    events.CohortLost: (_SUMMING, secure.cohort_lost),
    events.VersionCommitted: (frozenset({RunState.AGGREGATING}), _version_committed),
    events.VersionLost: (_NOT_ENDED, rollback.version_lost),
    events.RecallBegun: (frozenset(RunState), rollback.recall_begun),
    events.HoldingTold: (_WAITING, rollback.holding_told),
    events.VersionSought: (
        _WAITING,
        lambda run, event: replace(run, target_version=event.version, peers={}),
    ),
    events.VersionRecalled: (_WAITING, rollback.version_recalled),
    events.EvaluationOpened: (
        frozenset({RunState.EVALUATING, RunState.WAITING}),
        lambda run, event: replace(
            run,
            state=RunState.EVALUATING,
            evaluating=True,
            peers=dict.fromkeys(event.asked, "asked"),
        ),
    ),
    # A round of a Flower app may have no version, and no evaluation.
    events.RoundClosed: (_SUMMING, _round_closed),
    events.RunEnded: (_NOT_ENDED, _run_ended),
    events.RunResumed: (frozenset({RunState.STOPPED, RunState.FAILED}), rollback.run_resumed),
    events.PeerCompared: (
        ENDED,
        lambda run, event: replace(
            run,
            comparisons=run.comparisons | {event.peer: event.comparison},
            num_compared=run.num_compared + (event.peer not in run.comparisons),
        ),
    ),
    events.RunDeleted: (ENDED, lambda run, _: replace(run, deleted=True)),
}


def apply(run: Run, event: RunEvent) -> Run:
    """The run after `event`."""
    states, transition = TRANSITIONS[type(event)]
    return transition(run, event) if run.state in states else run


def replay(run_id: str, log: list[RunEvent]) -> Run:
    """The run after all these events. The first of them is RunStarted."""
    first = log[0]
    assert isinstance(first, events.RunStarted), "a run's first event is RunStarted"
    # A run that only evaluates opens no round: it evaluates the version of its round.
    before = 0 if first.spec.only == "evaluate" else 1
    run = Run(id=run_id, spec=first.spec, since=first.at, round=first.spec.first_round - before)
    for event in log[1:]:
        run = apply(run, event)
    return run
