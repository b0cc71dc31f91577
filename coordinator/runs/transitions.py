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
    any ──RecallBegun──> waiting, until VersionRecalled
    any ──RunEnded──> finished | stopped | failed        stopped, failed ──RunResumed──> waiting
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

from msgspec.structs import replace

from coordinator.runs import best_version, rollback
from coordinator.runs.secure import transitions as secure
from coordinator.runs.state import TOO_FEW, TOO_STALE, Assignment, Evaluation, Round, Run
from coordinator.storage import run_events as events
from coordinator.storage.run_events import RunEvent, Update
from protocols.messages import refusals
from protocols.messages.states import ENDED, RunState
from protocols.model.schema_card import SchemaCard

T = TypeVar("T")

#: The number of training times that a run remembers of each peer.
_MAX_TRAINING_TIMES = 5


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


def _declared(run: Run, peer: str, *numbers: int) -> dict[str, tuple[int, int]]:
    """The declared examples of all peers, with those of a peer for which none were known yet.

    Numbers that are declared again count only if they are smaller: the statistics of a table have
    all of its rows, and the description after it those that are left.
    """
    known = run.declared.get(peer, (0, 0))
    trained, held_out = (
        min(old, new) if old and new else old or new
        for old, new in zip(known, numbers, strict=True)
    )
    return run.declared | {peer: (trained, held_out)}


def _claimed(run: Run, peer: str, *numbers: int) -> dict[str, tuple[int, int]]:
    """The same after an accepted claim: the first one counts if nothing was declared."""
    known = run.declared.get(peer, (0, 0))
    trained, held_out = (old or new for old, new in zip(known, numbers, strict=True))
    return run.declared | {peer: (trained, held_out)}


def _update_accepted(run: Run, event: events.UpdateAccepted) -> Run:
    peer, update = event.peer, event.update
    run = _answered(run, peer)
    if not run.evaluating or update.base:
        run = replace(run, declared=_claimed(run, peer, update.num_examples, 0))
    else:
        run = replace(run, declared=_claimed(run, peer, 0, update.num_examples))
    if update.base:  # buffered, or late
        return replace(
            run,
            assignments=_without(run.assignments, peer),
            buffer=(*run.buffer, event),
            training_seconds=_training_seconds(run, peer, update.seconds),
        )
    run = replace(run, peers=run.peers | {peer: "answered"}, updates=run.updates | {peer: update})
    if run.evaluating:
        return run
    return replace(
        run,
        norms=run.norms | {peer: update.norm},
        training_seconds=_training_seconds(run, peer, update.seconds),
    )


def _answered(run: Run, peer: str) -> Run:
    """The run without the reason of a peer that was refused before."""
    if peer not in run.refusal_texts:
        return run
    return replace(run, refusal_texts=_without(run.refusal_texts, peer))


def _peer_described(run: Run, event: events.PeerDescribed) -> Run:
    peer = event.peer
    described = {peer: event.description}
    is_survey = run.spec.check and not isinstance(event.description, SchemaCard)
    return replace(
        _answered(run, peer),
        peers=run.peers | {peer: "answered"},
        described=run.described | described,
        surveyed=run.surveyed | described if is_survey else run.surveyed,
        declared=_declared(run, peer, event.num_examples, event.num_held_out),
    )


def _training_seconds(run: Run, peer: str, seconds: float) -> dict[str, tuple[float, ...]]:
    if not seconds:
        return run.training_seconds
    times = (*run.training_seconds.get(peer, ()), seconds)[-_MAX_TRAINING_TIMES:]
    return run.training_seconds | {peer: times}


def _without(by_peer: Mapping[str, T], peer: str) -> dict[str, T]:
    return {name: value for name, value in by_peer.items() if name != peer}


def _update_refused(run: Run, event: events.UpdateRefused) -> Run:
    peer, peers = event.peer, run.peers
    refusal = refusals.from_ledger(event.reason, event.detail)
    if event.reason == TOO_FEW:
        run = replace(run, excluded=run.excluded | {peer})
    if event.kind == "train":
        run = replace(run, training_seconds=_training_seconds(run, peer, event.seconds))
        assignment = run.assignments.get(peer)
        if assignment is not None and event.round == assignment.round:
            # A peer is not to blame for a stale update: it gets new work at once.
            cooling_down = frozenset() if event.reason == TOO_STALE else frozenset({peer})
            run = replace(
                run,
                assignments=_without(run.assignments, peer),
                cooling_down=run.cooling_down | cooling_down,
            )
    is_current = event.round == run.round and event.kind in ("", *run.open_kinds)
    if is_current and peers.get(peer) == "asked":
        peers = peers | {peer: "refused"}
    described = run.described
    if run.describing and event.kind == "describe" and peer in described:
        # Its description was accepted, but does not match those of the others.
        peers, described = peers | {peer: "refused"}, _without(described, peer)
    # A peer whose version was refused does not have it: ask another peer, or for another version.
    holdings = _without(run.holdings, peer) if event.kind == "recall" else run.holdings
    return replace(
        run,
        peers=peers,
        described=described,
        holdings=holdings,
        target_version=run.target_version if run.target_version in holdings.values() else None,
        refused=run.refused + 1,
        refusals=run.refusals + 1,
        last_refusal=refusal.text,
        last_refused=peer,
        refusal_kinds=run.refusal_kinds | {peer: refusal.kind},
        refusal_texts=run.refusal_texts | {peer: refusal.text},
    )


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
    )


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
    return replace(
        run,
        state=RunState.WAITING,
        evaluating=False,
        peers={},
        updates={},
        cohort=None,
        evaluations=run.evaluations | evaluations,
        history=(*run.history, closed),
        best=best_version.best(run.spec, (run.best, closed) if run.best else (closed,)),
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
        _peer_described,
    ),
    events.PreprocessingFixed: (
        _WAITING,
        lambda run, event: replace(run, preprocessing=event.text, peers={}, described={}),
    ),
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
    events.UpdateAccepted: (_OPEN | _WAITING, _update_accepted),
    events.UpdateRefused: (_NOT_ENDED, _update_refused),
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
    events.RoundClosed: (frozenset({RunState.EVALUATING}), _round_closed),
    events.RunEnded: (_NOT_ENDED, _run_ended),
    events.RunResumed: (frozenset({RunState.STOPPED, RunState.FAILED}), rollback.run_resumed),
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
