"""A run as a pure state machine: facts in, the next step out. No I/O, no clock.

Rule 1. The state of a run is the fold of its facts (`apply`); the ledger holds nothing else of it.
Rule 2. `decide(run, view)` says what to do next; doing it gives new facts, and nothing else does.
Rule 3. What is in the view (who is there, has the deadline passed) may change a decision, never
        the state: so replaying the ledger gives the same state, digest for digest.

    waiting ──RoundOpened──> training ──TrainingClosed──> aggregating
       ^                                                       │ VersionCommitted
       └───────────RoundClosed─────────── evaluating <─────────┘
    any ──RunEnded──> finished | stopped | failed
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from protocols.messages import Metrics
from protocols.states import ENDED, RunState

Setting = str | int | float | bool


class RunSpec(Struct, frozen=True, kw_only=True):
    """What was asked for at the start; part of the run's record and never changed.

    `deadline_s` counts from the opening of a round's training, and again of its evaluation. When it
    passes without the quorum, whoever could help is asked, or asked again, and it counts anew.
    `codec`: how updates are made smaller, one of `protocols.codecs`.
    `weighting`: updates count by their examples, or all the same. `clip_norm` (0: off) bounds how
    far, as a Euclidean norm, one update may move the weights.
    """

    task: str
    rounds: int
    strategy: str = "fedavg"
    strategy_args: dict[str, Setting] = {}
    settings: dict[str, Setting] = {}
    codec: str = "fp32"
    seed: int = 0
    quorum: int = 1
    deadline_s: float = 600.0
    weighting: Literal["examples", "equal"] = "examples"
    max_weight_share: float = 1.0
    max_examples: int = 10_000_000
    clip_norm: float = 0.0


class Update(Struct, frozen=True, kw_only=True):
    """An accepted answer: what was claimed and checked. `digest` is empty for an evaluation."""

    digest: str = ""
    nbytes: int = 0
    num_examples: int
    metrics: Metrics = {}
    norm: float = 0.0


# --- facts: past tense, kept in the ledger ----------------------------------------------------


class RunStarted(Struct, frozen=True, tag=True):
    spec: RunSpec


class WeightsInitialised(Struct, frozen=True, tag=True):
    """The first version is there; `by` is the peer that made it, or the file it came from."""

    digest: str
    by: str


class RoundOpened(Struct, frozen=True, tag=True):
    round: int
    base: str
    asked: tuple[str, ...]


class PeersAsked(Struct, frozen=True, tag=True):
    """More peers, or lost ones that came back, were asked for the work of the open round."""

    peers: tuple[str, ...]


class PeerLost(Struct, frozen=True, tag=True):
    """A peer that was asked went away or said that it cannot do the work."""

    peer: str
    reason: str


class UpdateAccepted(Struct, frozen=True, tag=True):
    round: int
    peer: str
    update: Update


class UpdateRefused(Struct, frozen=True, tag=True):
    """`round` and `kind` are those of the question: a late answer to an old one settles nothing."""

    round: int
    peer: str
    reason: str
    detail: str
    kind: str = ""


class TrainingClosed(Struct, frozen=True, tag=True):
    """No more updates for this round: these are summed, in this order."""

    round: int
    contributors: tuple[str, ...]


class VersionCommitted(Struct, frozen=True, tag=True):
    """`strategy_state`: digests, by slot, of what the strategy remembers after this version."""

    round: int
    digest: str
    parent: str
    contributors: tuple[str, ...]
    metrics: Metrics
    strategy_state: dict[str, str] = {}


class VersionLost(Struct, frozen=True, tag=True):
    """The newest version is damaged on disk. The run goes on from `to`, an earlier one."""

    digest: str
    to: str


class EvaluationOpened(Struct, frozen=True, tag=True):
    round: int
    asked: tuple[str, ...]


class RoundClosed(Struct, frozen=True, tag=True):
    """`seconds` since the round was opened; `metrics` are federated evaluation (may be empty).

    `spent`: seconds by part of the round: `work` until the first update is in, `wait` for the
    others, `aggregate`, `evaluate`.
    """

    round: int
    metrics: Metrics
    seconds: float
    bytes_up: int
    bytes_down: int
    spent: dict[str, float] = {}


class RunEnded(Struct, frozen=True, tag=True):
    state: RunState
    because: str


Fact = (
    RunStarted
    | WeightsInitialised
    | RoundOpened
    | PeersAsked
    | PeerLost
    | UpdateAccepted
    | UpdateRefused
    | TrainingClosed
    | VersionCommitted
    | VersionLost
    | EvaluationOpened
    | RoundClosed
    | RunEnded
)

encode_fact = msgspec.json.Encoder().encode
decode_fact = msgspec.json.Decoder(Fact).decode


# --- state -----------------------------------------------------------------------------------

Standing = Literal["asked", "answered", "refused", "lost"]


class Round(Struct, frozen=True, kw_only=True):
    """A closed round; `spread` has by metric the least, the median and the most of all peers."""

    round: int
    digest: str
    contributors: tuple[str, ...]
    refused: int
    metrics: Metrics
    seconds: float
    bytes_up: int
    bytes_down: int
    norms: dict[str, float]
    strategy_state: dict[str, str] = {}
    spread: dict[str, tuple[float, float, float]] = {}
    spent: dict[str, float] = {}


class Run(Struct, frozen=True, kw_only=True):
    """Where a run stands. `first` are its first weights, `head` is the newest version; `best` the
    best by `score`."""

    id: str
    spec: RunSpec
    state: RunState = RunState.WAITING
    round: int = 0
    first: str = ""
    head: str = ""
    parent: str = ""
    peers: dict[str, Standing] = {}
    updates: dict[str, Update] = {}
    contributors: tuple[str, ...] = ()
    evaluating: bool = False
    refused: int = 0
    last_refusal: str = ""
    norms: dict[str, float] = {}
    history: tuple[Round, ...] = ()
    best: Round | None = None
    strategy_state: dict[str, str] = {}
    ended_because: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def kind(self) -> Literal["init", "train", "evaluate"]:
        """What peers are asked for in this state."""
        if self.state is RunState.WAITING:
            return "init"
        return "train" if self.state is RunState.TRAINING else "evaluate"

    @property
    def pending(self) -> tuple[str, ...]:
        """Peers whose answer is awaited, in name order."""
        return tuple(sorted(p for p, standing in self.peers.items() if standing == "asked"))


def _weights_initialised(run: Run, fact: WeightsInitialised) -> Run:
    return replace(run, first=fact.digest, head=fact.digest, peers={})


def _round_opened(run: Run, fact: RoundOpened) -> Run:
    return replace(
        run,
        state=RunState.TRAINING,
        round=fact.round,
        parent=fact.base,
        peers=dict.fromkeys(fact.asked, "asked"),
        updates={},
        contributors=(),
        norms={},
        refused=0,
    )


def _peers_asked(run: Run, fact: PeersAsked) -> Run:
    return replace(run, peers=run.peers | dict.fromkeys(fact.peers, "asked"))


def _peer_lost(run: Run, fact: PeerLost) -> Run:
    if run.peers.get(fact.peer) != "asked":
        return run
    return replace(run, peers=run.peers | {fact.peer: "lost"})


def _update_accepted(run: Run, fact: UpdateAccepted) -> Run:
    return replace(
        run,
        peers=run.peers | {fact.peer: "answered"},
        updates=run.updates | {fact.peer: fact.update},
        norms=run.norms | {fact.peer: fact.update.norm} if not run.evaluating else run.norms,
    )


def _update_refused(run: Run, fact: UpdateRefused) -> Run:
    peers = run.peers
    present = fact.round == run.round and fact.kind in ("", run.kind)
    if present and peers.get(fact.peer) == "asked":
        peers = peers | {fact.peer: "refused"}
    refusal = f"{fact.reason}: {fact.detail}"
    return replace(run, peers=peers, refused=run.refused + 1, last_refusal=refusal)


def _training_closed(run: Run, fact: TrainingClosed) -> Run:
    return replace(run, state=RunState.AGGREGATING, contributors=fact.contributors)


def _version_committed(run: Run, fact: VersionCommitted) -> Run:
    return replace(
        run,
        state=RunState.EVALUATING,
        head=fact.digest,
        strategy_state=fact.strategy_state,
        peers={},
        updates={},
    )


def _version_lost(run: Run, fact: VersionLost) -> Run:
    """As it was when `to` was the newest: what came after is done again."""
    digests = [closed.digest for closed in run.history]
    kept = run.history[: digests.index(fact.to) + 1 if fact.to in digests else 0]
    return replace(
        run,
        state=RunState.WAITING,
        round=len(kept),
        head=fact.to,
        parent=kept[-2].digest if len(kept) > 1 else run.first if kept else "",
        peers={},
        updates={},
        contributors=(),
        evaluating=False,
        norms={},
        refused=0,
        history=kept,
        best=max(kept, key=score, default=None),
        strategy_state=kept[-1].strategy_state if kept else {},
    )


def _evaluation_opened(run: Run, fact: EvaluationOpened) -> Run:
    return replace(run, evaluating=True, peers=dict.fromkeys(fact.asked, "asked"))


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
        spent=fact.spent,
    )
    best = closed if run.best is None or score(closed) > score(run.best) else run.best
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
    return replace(run, state=fact.state, ended_because=fact.because, peers={}, updates={})


_ANY = frozenset(RunState) - ENDED
_OPEN = frozenset({RunState.TRAINING, RunState.EVALUATING})

#: fact -> (states in which it may happen, what it does). Anywhere else it changes nothing.
TRANSITIONS: dict[type, tuple[frozenset[RunState], Callable[..., Run]]] = {
    WeightsInitialised: (frozenset({RunState.WAITING}), _weights_initialised),
    RoundOpened: (frozenset({RunState.WAITING}), _round_opened),
    PeersAsked: (_OPEN | {RunState.WAITING}, _peers_asked),
    PeerLost: (_OPEN | {RunState.WAITING}, _peer_lost),
    UpdateAccepted: (_OPEN, _update_accepted),
    UpdateRefused: (_ANY, _update_refused),
    TrainingClosed: (frozenset({RunState.TRAINING}), _training_closed),
    VersionCommitted: (frozenset({RunState.AGGREGATING}), _version_committed),
    VersionLost: (_ANY, _version_lost),
    EvaluationOpened: (frozenset({RunState.EVALUATING}), _evaluation_opened),
    RoundClosed: (frozenset({RunState.EVALUATING}), _round_closed),
    RunEnded: (_ANY, _run_ended),
}


def apply(run: Run, fact: Fact) -> Run:
    """The run after `fact`."""
    states, transition = TRANSITIONS[type(fact)]
    return transition(run, fact) if run.state in states else run


def replay(run_id: str, facts: list[Fact]) -> Run:
    """The run that these facts, the first of them RunStarted, add up to."""
    first = facts[0]
    assert isinstance(first, RunStarted), "a run's first fact is RunStarted"
    run = Run(id=run_id, spec=first.spec)
    for fact in facts[1:]:
        run = apply(run, fact)
    return run


def score(closed: Round) -> float:
    """What makes a version best: accuracy where the task reports it, else the lowest loss."""
    accuracy, loss = closed.metrics.get("accuracy"), closed.metrics.get("loss")
    if accuracy is not None:
        return accuracy
    return -loss if loss is not None else float("-inf")


# --- decisions -------------------------------------------------------------------------------


class View(NamedTuple):
    """What the run cannot know: the peers that could work now, and whether time is up."""

    eligible: frozenset[str]
    due: bool = False


class AskInit(NamedTuple):
    """Ask one peer for the first weights."""

    peer: str


class OpenRound(NamedTuple):
    round: int
    base: str
    eligible: tuple[str, ...]


class AskMore(NamedTuple):
    """Give the open round's work to these peers too."""

    peers: tuple[str, ...]


class CloseTraining(NamedTuple):
    contributors: tuple[str, ...]


class Aggregate(NamedTuple):
    contributors: tuple[str, ...]


class OpenEvaluation(NamedTuple):
    eligible: tuple[str, ...]


class CloseRound(NamedTuple):
    pass


class EndRun(NamedTuple):
    state: RunState
    because: str


class Wait(NamedTuple):
    """Nothing to do until something changes; `what` is for a person."""

    what: str


Step = (
    AskInit
    | OpenRound
    | AskMore
    | CloseTraining
    | Aggregate
    | OpenEvaluation
    | CloseRound
    | EndRun
    | Wait
)


def decide(run: Run, view: View) -> Step:
    """The next step of a run that has not ended."""
    match run.state:
        case RunState.WAITING:
            return _decide_waiting(run, view)
        case RunState.TRAINING:
            return _decide_training(run, view)
        case RunState.AGGREGATING:
            return Aggregate(run.contributors)
        case RunState.EVALUATING:
            return _decide_evaluating(run, view)
        case _:
            return Wait(f"the run has {run.state}")


def _decide_waiting(run: Run, view: View) -> Step:
    if run.round >= run.spec.rounds:
        return EndRun(RunState.FINISHED, f"all {run.spec.rounds} rounds are done")
    if not run.head:
        return _decide_init(run, view)
    if len(view.eligible) < run.spec.quorum:
        return Wait(f"{_peers(run.spec.quorum - len(view.eligible))} more for the quorum")
    return OpenRound(run.round + 1, run.head, tuple(sorted(view.eligible)))


def _decide_init(run: Run, view: View) -> Step:
    refused = {peer for peer, standing in run.peers.items() if standing == "refused"}
    if view.eligible and view.eligible <= refused and not run.pending:
        # Nobody who is here can do it, and asking again gives the same answer.
        return EndRun(RunState.FAILED, f"nobody could make the first weights: {run.last_refusal}")
    if view.due and view.eligible:
        return AskMore(tuple(sorted(view.eligible)))
    if run.pending:
        return Wait(f"the first weights from {run.pending[0]}")
    untried = sorted(view.eligible - refused)
    return AskInit(untried[0]) if untried else Wait("a peer that can make the first weights")


def _decide_training(run: Run, view: View) -> Step:
    answered = len(run.updates)
    if answered >= run.spec.quorum and (view.due or not run.pending):
        return CloseTraining(tuple(sorted(run.updates)))
    back = {p for p, standing in run.peers.items() if standing == "lost"} & view.eligible
    if back:
        return AskMore(tuple(sorted(back)))
    if view.due and (others := view.eligible - run.updates.keys()):
        # The new, those that failed, and those that were asked: the question may have been lost.
        return AskMore(tuple(sorted(others)))
    if answered + len(run.pending) < run.spec.quorum:
        new = view.eligible - run.peers.keys()
        if new:
            return AskMore(tuple(sorted(new)))
        missing = run.spec.quorum - answered - len(run.pending)
        return Wait(f"{_peers(missing)} more for the quorum")
    if view.due:
        return Wait(f"the quorum: {answered} of {run.spec.quorum}; the deadline has passed")
    return Wait(f"updates of {_peers(len(run.pending))}")


def _decide_evaluating(run: Run, view: View) -> Step:
    if not run.evaluating:
        return OpenEvaluation(tuple(sorted(view.eligible))) if view.eligible else CloseRound()
    if view.due or not run.pending:
        return CloseRound()
    return Wait(f"the evaluation by {_peers(len(run.pending))}")


def _peers(count: int) -> str:
    return f"{count} peer" + ("s" if count != 1 else "")
