"""A run as a pure state machine: events in, its state out. No I/O, no clock.

Rule 1. The state of a run is the fold of its events (`apply`); the ledger holds nothing else.
Rule 2. `decisions.decide(run, observed)` says what to do next; doing it gives new events,
        and nothing else does.
Rule 3. What is in the view (who is there, has the deadline passed) may change a decision, never
        the state: so replaying the ledger gives the same state, digest for digest.

    waiting ──RoundOpened──> training ──TrainingClosed──> aggregating
       ^                                                       │ VersionCommitted
       └───────────RoundClosed─────────── evaluating <─────────┘
    any ──RecallBegun──> waiting, until VersionRecalled
    any ──RunEnded──> finished | stopped | failed        stopped, failed ──RunResumed──> waiting
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from msgspec.structs import replace

from coordinator.runs import best_version, rollback
from coordinator.runs.state import TOO_FEW, TOO_STALE, Assignment, Round, Run
from coordinator.storage.run_events import (
    EvaluationOpened,
    HoldingTold,
    PeerDescribed,
    PeerLost,
    PeersAsked,
    PreprocessingFixed,
    RecallBegun,
    RoundClosed,
    RoundOpened,
    RunDeleted,
    RunEnded,
    RunEvent,
    RunResumed,
    RunStarted,
    SchemaAgreed,
    TrainingClosed,
    Update,
    UpdateAccepted,
    UpdateRefused,
    VersionCommitted,
    VersionLost,
    VersionRecalled,
    VersionSought,
    WeightsInitialised,
    WorkGiven,
)
from protocols.messages.states import ENDED, RunState

#: Answers of a peer whose times a run remembers.
_REMEMBERED = 5


def _peer_described(run: Run, event: PeerDescribed) -> Run:
    return replace(
        run,
        peers=run.peers | {event.peer: "answered"},
        described=run.described | {event.peer: event.description},
    )


def _preprocessing_fixed(run: Run, event: PreprocessingFixed) -> Run:
    return replace(run, preprocessing=event.text, peers={}, described={})


def _schema_agreed(run: Run, event: SchemaAgreed) -> Run:
    return replace(run, card=event.card, peers={}, described={})


def _weights_initialised(run: Run, event: WeightsInitialised) -> Run:
    return replace(run, first=event.digest, head=event.digest, peers={})


def _round_opened(run: Run, event: RoundOpened) -> Run:
    return replace(
        run,
        state=RunState.TRAINING,
        round=event.round,
        parent=event.base,
        num_eligible=event.eligible or len(event.asked),
        peers=dict.fromkeys(event.asked, "asked"),
        updates={},
        contributors=(),
        norms={},
        refused=0,
    )


def _peers_asked(run: Run, event: PeersAsked) -> Run:
    return replace(run, peers=run.peers | dict.fromkeys(event.peers, "asked"))


def _work_given(run: Run, event: WorkGiven) -> Run:
    given = Assignment(event.round, event.base, event.turn)
    return replace(
        run,
        assignments=run.assignments | {event.peer: given},
        last_assignments=run.last_assignments | {event.peer: given},
        cooling_down=run.cooling_down - {event.peer},
    )


def _peer_lost(run: Run, event: PeerLost) -> Run:
    if (given := run.assignments.get(event.peer)) is not None:
        run = replace(run, assignments=run.assignments | {event.peer: replace(given, lost=True)})
    if run.peers.get(event.peer) != "asked":
        return run
    return replace(run, peers=run.peers | {event.peer: "lost"})


def _update_accepted(run: Run, event: UpdateAccepted) -> Run:
    if event.update.base:
        return replace(
            run,
            assignments=_without(run.assignments, event.peer),
            buffer=(*run.buffer, event),
            training_seconds=_needed(run, event.peer, event.update.seconds),
        )
    run = replace(
        run,
        peers=run.peers | {event.peer: "answered"},
        updates=run.updates | {event.peer: event.update},
    )
    if run.evaluating:
        return run
    norms = run.norms | {event.peer: event.update.norm}
    return replace(
        run, norms=norms, training_seconds=_needed(run, event.peer, event.update.seconds)
    )


def _needed(run: Run, peer: str, seconds: float) -> dict[str, tuple[float, ...]]:
    if not seconds:
        return run.training_seconds
    return run.training_seconds | {
        peer: (*run.training_seconds.get(peer, ()), seconds)[-_REMEMBERED:]
    }


def _without(given: dict[str, Assignment], peer: str) -> dict[str, Assignment]:
    return {name: work for name, work in given.items() if name != peer}


def _update_refused(run: Run, event: UpdateRefused) -> Run:
    if event.reason == TOO_FEW:
        run = replace(run, excluded=run.excluded | {event.peer})
    given = run.assignments.get(event.peer)
    if given is not None and event.kind == "train" and event.round == given.round:
        # What came too late is no fault of its peer: it has new work at once.
        resting = run.cooling_down if event.reason == TOO_STALE else run.cooling_down | {event.peer}
        run = replace(run, assignments=_without(run.assignments, event.peer), cooling_down=resting)
    peers = run.peers
    present = event.round == run.round and event.kind in ("", run.kind)
    if present and peers.get(event.peer) == "asked":
        peers = peers | {event.peer: "refused"}
    described = run.described
    if run.describing and event.kind == "describe" and event.peer in described:
        # It was heard, and found not to fit the others.
        peers = peers | {event.peer: "refused"}
        described = {peer: told for peer, told in described.items() if peer != event.peer}
    holdings = run.holdings
    if event.kind == "recall":  # it has not what it told of: another holder, or another version
        holdings = {peer: held for peer, held in holdings.items() if peer != event.peer}
    return replace(
        run,
        peers=peers,
        described=described,
        holdings=holdings,
        target_version=run.target_version if run.target_version in holdings.values() else None,
        refused=run.refused + 1,
        refusals=run.refusals + 1,
        last_refusal=f"{event.reason}: {event.detail}",
        last_refused=event.peer,
        training_seconds=_needed(run, event.peer, event.seconds)
        if event.kind == "train"
        else run.training_seconds,
    )


def _training_closed(run: Run, event: TrainingClosed) -> Run:
    examples = sum(run.updates[p].num_examples for p in event.contributors if p in run.updates)
    run = replace(
        run,
        state=RunState.AGGREGATING,
        contributors=event.contributors,
        num_examples=examples,
    )
    staleness: dict[str, int] = {}
    for peer, update in ((accepted.peer, accepted.update) for accepted in run.buffer):
        staleness[peer] = max(staleness.get(peer, 0), update.staleness)
    norms = {accepted.peer: accepted.update.norm for accepted in run.buffer} | run.norms
    return replace(run, norms=norms, staleness=staleness)


def _version_committed(run: Run, event: VersionCommitted) -> Run:
    return replace(
        run,
        state=RunState.EVALUATING,
        head=event.digest,
        strategy_state=event.strategy_state,
        peers={},
        updates={},
        buffer=(),
        cooling_down=frozenset(),
    )


def _evaluation_opened(run: Run, event: EvaluationOpened) -> Run:
    return replace(
        run,
        state=RunState.EVALUATING,
        evaluating=True,
        peers=dict.fromkeys(event.asked, "asked"),
    )


def _spread(answers: dict[str, Update]) -> dict[str, tuple[float, float, float]]:
    told: dict[str, list[float]] = {}
    for answer in answers.values():
        for name, value in answer.metrics.items():
            if value is not None and math.isfinite(value):
                told.setdefault(name, []).append(value)
    return {name: (min(vs), statistics.median(vs), max(vs)) for name, vs in told.items()}


def _round_closed(run: Run, event: RoundClosed) -> Run:
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
        spread=_spread(run.updates) if run.evaluating else {},
        worst=best_version.worst_peers(run.updates) if run.evaluating else {},
        tallies=event.tallies,
        spent=event.spent,
        staleness=run.staleness,
        num_examples=run.num_examples,
        num_evaluated=sum(update.num_examples for update in run.updates.values())
        if run.evaluating
        else 0,
    )
    best = run.best
    if best is None or best_version.score(run.spec, closed.metrics) > best_version.score(
        run.spec, best.metrics
    ):
        best = closed
    return replace(
        run,
        state=RunState.WAITING,
        evaluating=False,
        peers={},
        updates={},
        history=(*run.history, closed),
        best=best,
    )


def _run_ended(run: Run, event: RunEnded) -> Run:
    return replace(
        run,
        state=event.state,
        ended_in=run.state,
        ended_because=event.because,
        peers={},
        updates={},
        assignments={},
        buffer=(),
    )


def _run_deleted(run: Run, event: RunDeleted) -> Run:
    return replace(run, deleted=True)


_ANY = frozenset(RunState) - ENDED
_OPEN = frozenset({RunState.TRAINING, RunState.EVALUATING})

#: event -> (states in which it may happen, what it does). Anywhere else it changes nothing.
TRANSITIONS: dict[type, tuple[frozenset[RunState], Callable[..., Run]]] = {
    PeerDescribed: (frozenset({RunState.WAITING}), _peer_described),
    PreprocessingFixed: (frozenset({RunState.WAITING}), _preprocessing_fixed),
    SchemaAgreed: (frozenset({RunState.WAITING}), _schema_agreed),
    WeightsInitialised: (frozenset({RunState.WAITING}), _weights_initialised),
    RoundOpened: (frozenset({RunState.WAITING}), _round_opened),
    WorkGiven: (_OPEN, _work_given),
    PeersAsked: (_OPEN | {RunState.WAITING}, _peers_asked),
    PeerLost: (_OPEN | {RunState.WAITING}, _peer_lost),
    UpdateAccepted: (_OPEN | {RunState.WAITING}, _update_accepted),
    UpdateRefused: (_ANY, _update_refused),
    TrainingClosed: (frozenset({RunState.TRAINING}), _training_closed),
    VersionCommitted: (frozenset({RunState.AGGREGATING}), _version_committed),
    VersionLost: (_ANY, rollback.version_lost),
    RecallBegun: (frozenset(RunState), rollback.recall_begun),
    HoldingTold: (frozenset({RunState.WAITING}), rollback.holding_told),
    VersionSought: (frozenset({RunState.WAITING}), rollback.version_sought),
    VersionRecalled: (frozenset({RunState.WAITING}), rollback.version_recalled),
    EvaluationOpened: (
        frozenset({RunState.EVALUATING, RunState.WAITING}),
        _evaluation_opened,
    ),
    RoundClosed: (frozenset({RunState.EVALUATING}), _round_closed),
    RunEnded: (_ANY, _run_ended),
    RunResumed: (frozenset({RunState.STOPPED, RunState.FAILED}), rollback.run_resumed),
    RunDeleted: (ENDED, _run_deleted),
}


def apply(run: Run, event: RunEvent) -> Run:
    """The run after `event`."""
    states, transition = TRANSITIONS[type(event)]
    return transition(run, event) if run.state in states else run


def replay(run_id: str, events: list[RunEvent]) -> Run:
    """The run that these events, the first of them RunStarted, add up to."""
    first = events[0]
    assert isinstance(first, RunStarted), "a run's first event is RunStarted"
    # An evaluation alone is one of the round's version, and no round opens.
    before = 0 if first.spec.only == "evaluate" else 1
    run = Run(id=run_id, spec=first.spec, since=first.at, round=first.spec.first_round - before)
    for event in events[1:]:
        run = apply(run, event)
    return run
