"""A run as a pure state machine: facts in, its state out. No I/O, no clock.

Rule 1. The state of a run is the fold of its facts (`apply`); the ledger holds nothing else of it.
Rule 2. `decisions.decide(run, view)` says what to do next; doing it gives new facts, and nothing
        else does.
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
from coordinator.runs.state import TOO_FEW, TOO_STALE, Given, Round, Run
from coordinator.storage.run_events import (
    EvaluationOpened,
    Fact,
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


def _peer_described(run: Run, fact: PeerDescribed) -> Run:
    return replace(
        run,
        peers=run.peers | {fact.peer: "answered"},
        described=run.described | {fact.peer: fact.description},
    )


def _preprocessing_fixed(run: Run, fact: PreprocessingFixed) -> Run:
    return replace(run, preprocessing=fact.text, peers={}, described={})


def _schema_agreed(run: Run, fact: SchemaAgreed) -> Run:
    return replace(run, card=fact.card, peers={}, described={})


def _weights_initialised(run: Run, fact: WeightsInitialised) -> Run:
    return replace(run, first=fact.digest, head=fact.digest, peers={})


def _round_opened(run: Run, fact: RoundOpened) -> Run:
    return replace(
        run,
        state=RunState.TRAINING,
        round=fact.round,
        parent=fact.base,
        eligible=fact.eligible or len(fact.asked),
        peers=dict.fromkeys(fact.asked, "asked"),
        updates={},
        contributors=(),
        norms={},
        refused=0,
    )


def _peers_asked(run: Run, fact: PeersAsked) -> Run:
    return replace(run, peers=run.peers | dict.fromkeys(fact.peers, "asked"))


def _work_given(run: Run, fact: WorkGiven) -> Run:
    given = Given(fact.round, fact.base, fact.turn)
    return replace(
        run,
        given=run.given | {fact.peer: given},
        last=run.last | {fact.peer: given},
        resting=run.resting - {fact.peer},
    )


def _peer_lost(run: Run, fact: PeerLost) -> Run:
    if (given := run.given.get(fact.peer)) is not None:
        run = replace(run, given=run.given | {fact.peer: replace(given, lost=True)})
    if run.peers.get(fact.peer) != "asked":
        return run
    return replace(run, peers=run.peers | {fact.peer: "lost"})


def _update_accepted(run: Run, fact: UpdateAccepted) -> Run:
    if fact.update.base:
        return replace(
            run,
            given=_without(run.given, fact.peer),
            buffer=(*run.buffer, fact),
            needed=_needed(run, fact.peer, fact.update.seconds),
        )
    run = replace(
        run,
        peers=run.peers | {fact.peer: "answered"},
        updates=run.updates | {fact.peer: fact.update},
    )
    if run.evaluating:
        return run
    norms = run.norms | {fact.peer: fact.update.norm}
    return replace(run, norms=norms, needed=_needed(run, fact.peer, fact.update.seconds))


def _needed(run: Run, peer: str, seconds: float) -> dict[str, tuple[float, ...]]:
    if not seconds:
        return run.needed
    return run.needed | {peer: (*run.needed.get(peer, ()), seconds)[-_REMEMBERED:]}


def _without(given: dict[str, Given], peer: str) -> dict[str, Given]:
    return {name: work for name, work in given.items() if name != peer}


def _update_refused(run: Run, fact: UpdateRefused) -> Run:
    if fact.reason == TOO_FEW:
        run = replace(run, excluded=run.excluded | {fact.peer})
    given = run.given.get(fact.peer)
    if given is not None and fact.kind == "train" and fact.round == given.round:
        # What came too late is no fault of its peer: it has new work at once.
        resting = run.resting if fact.reason == TOO_STALE else run.resting | {fact.peer}
        run = replace(run, given=_without(run.given, fact.peer), resting=resting)
    peers = run.peers
    present = fact.round == run.round and fact.kind in ("", run.kind)
    if present and peers.get(fact.peer) == "asked":
        peers = peers | {fact.peer: "refused"}
    described = run.described
    if run.describing and fact.kind == "describe" and fact.peer in described:
        # It was heard, and found not to fit the others.
        peers = peers | {fact.peer: "refused"}
        described = {peer: told for peer, told in described.items() if peer != fact.peer}
    holdings = run.holdings
    if fact.kind == "recall":  # it has not what it told of: another holder, or another version
        holdings = {peer: held for peer, held in holdings.items() if peer != fact.peer}
    return replace(
        run,
        peers=peers,
        described=described,
        holdings=holdings,
        sought=run.sought if run.sought in holdings.values() else None,
        refused=run.refused + 1,
        refusals=run.refusals + 1,
        last_refusal=f"{fact.reason}: {fact.detail}",
        last_refused=fact.peer,
        needed=_needed(run, fact.peer, fact.seconds) if fact.kind == "train" else run.needed,
    )


def _training_closed(run: Run, fact: TrainingClosed) -> Run:
    examples = sum(run.updates[p].num_examples for p in fact.contributors if p in run.updates)
    run = replace(
        run,
        state=RunState.AGGREGATING,
        contributors=fact.contributors,
        num_examples=examples,
    )
    staleness: dict[str, int] = {}
    for peer, update in ((accepted.peer, accepted.update) for accepted in run.buffer):
        staleness[peer] = max(staleness.get(peer, 0), update.staleness)
    norms = {accepted.peer: accepted.update.norm for accepted in run.buffer} | run.norms
    return replace(run, norms=norms, staleness=staleness)


def _version_committed(run: Run, fact: VersionCommitted) -> Run:
    return replace(
        run,
        state=RunState.EVALUATING,
        head=fact.digest,
        strategy_state=fact.strategy_state,
        peers={},
        updates={},
        buffer=(),
        resting=frozenset(),
    )


def _evaluation_opened(run: Run, fact: EvaluationOpened) -> Run:
    return replace(
        run,
        state=RunState.EVALUATING,
        evaluating=True,
        peers=dict.fromkeys(fact.asked, "asked"),
    )


def _spread(answers: dict[str, Update]) -> dict[str, tuple[float, float, float]]:
    told: dict[str, list[float]] = {}
    for answer in answers.values():
        for name, value in answer.metrics.items():
            if value is not None and math.isfinite(value):
                told.setdefault(name, []).append(value)
    return {name: (min(vs), statistics.median(vs), max(vs)) for name, vs in told.items()}


def _round_closed(run: Run, fact: RoundClosed) -> Run:
    closed = Round(
        round=run.round,
        digest=run.head,
        contributors=run.contributors,
        refused=run.refused,
        metrics=fact.metrics,
        seconds=fact.seconds,
        bytes_up=fact.bytes_up,
        bytes_down=fact.bytes_down,
        norms=run.norms,
        strategy_state=run.strategy_state,
        spread=_spread(run.updates) if run.evaluating else {},
        worst=best_version.worst(run.updates) if run.evaluating else {},
        tallies=fact.tallies,
        spent=fact.spent,
        staleness=run.staleness,
        num_examples=run.num_examples,
        num_evaluated=sum(update.num_examples for update in run.updates.values())
        if run.evaluating
        else 0,
    )
    best = run.best
    if best is None or best_version.merit(run.spec, closed.metrics) > best_version.merit(
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


def _run_ended(run: Run, fact: RunEnded) -> Run:
    return replace(
        run,
        state=fact.state,
        ended_in=run.state,
        ended_because=fact.because,
        peers={},
        updates={},
        given={},
        buffer=(),
    )


def _run_deleted(run: Run, fact: RunDeleted) -> Run:
    return replace(run, deleted=True)


_ANY = frozenset(RunState) - ENDED
_OPEN = frozenset({RunState.TRAINING, RunState.EVALUATING})

#: fact -> (states in which it may happen, what it does). Anywhere else it changes nothing.
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


def apply(run: Run, fact: Fact) -> Run:
    """The run after `fact`."""
    states, transition = TRANSITIONS[type(fact)]
    return transition(run, fact) if run.state in states else run


def replay(run_id: str, facts: list[Fact]) -> Run:
    """The run that these facts, the first of them RunStarted, add up to."""
    first = facts[0]
    assert isinstance(first, RunStarted), "a run's first fact is RunStarted"
    # An evaluation alone is one of the round's version, and no round opens.
    before = 0 if first.spec.only == "evaluate" else 1
    run = Run(id=run_id, spec=first.spec, since=first.at, round=first.spec.first_round - before)
    for fact in facts[1:]:
        run = apply(run, fact)
    return run
