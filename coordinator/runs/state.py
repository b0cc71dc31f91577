"""The state of a run, with its closed rounds. Pure.

Events change it (`runs.transitions`), and `runs.decisions` says what comes next.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated, Literal, TypeVar

from msgspec import Meta, Struct

from coordinator.storage.run_events import (
    Holding,
    ModelChosen,
    RunSpec,
    Update,
    UpdateAccepted,
)
from protocols.messages.comparisons import Comparison
from protocols.messages.envelope import MAX_PEERS, Integer, Metrics, Tallies, Time
from protocols.messages.states import ENDED, RunState
from protocols.messages.work import WorkKind
from protocols.model.schema_card import Description, SchemaCard
from protocols.tables import preprocessing
from protocols.tables.model_scores import AUTO, MODELS, Model, ModelScores, is_open

T = TypeVar("T")
#: Bounds for monitors, which decode runs. The ledger may have any text.
_Line = Annotated[str, Meta(max_length=64 * 1024)]
_Peers = Annotated[tuple[_Line, ...], Meta(max_length=MAX_PEERS)]
_ByPeer = Annotated[dict[_Line, T], Meta(max_length=MAX_PEERS)]
_ByName = Annotated[dict[_Line, T], Meta(max_length=1024)]
PeerStatus = Literal["asked", "answered", "refused", "lost"]

#: Reasons of refusals that have consequences in later rounds.
TOO_STALE, TOO_FEW = "too stale", "too few examples"


class Round(Struct, frozen=True, kw_only=True):
    """A closed round. `norms` and `staleness` are by peer, `spent` is seconds by phase.

    `limited`: contributors that counted less, and how many times the median they pulled.
    `decisive`: by metric, the value that decides instead of the one in `metrics`.

    `on_time`: contributors with an update for this round; the others only had late ones.

    By metric: `spread` has the minimum, median and maximum over all peers, `worst` the peer with
    the worst value. `num_examples`: of all contributors together.
    """

    round: Integer
    digest: _Line
    contributors: _Peers = ()
    refused: Integer = 0
    metrics: Metrics = {}
    seconds: float = 0.0
    bytes_up: Integer = 0
    bytes_down: Integer = 0
    norms: _ByPeer[float] = {}
    strategy_state: _ByName[_Line] = {}
    spread: _ByName[tuple[float, float, float]] = {}
    worst: _ByName[_Line] = {}
    tallies: Tallies = {}
    spent: _ByName[float] = {}
    staleness: _ByPeer[Integer] = {}
    num_examples: Integer = 0
    num_evaluated: Integer = 0
    limited: _ByPeer[float] = {}
    decisive: Metrics = {}
    on_time: _Peers = ()


class Evaluation(Struct, frozen=True):
    """How a peer last evaluated a version, on `num_examples` held-out rows of its own."""

    round: Integer
    num_examples: Integer
    metrics: Metrics = {}


_Rounds = Annotated[tuple[Round, ...], Meta(max_length=1 << 20)]


class Standing(Struct, frozen=True, kw_only=True):
    """How the versions of a model compare (`best_version.after`).

    `best`: the best of them; `peak`: the best by the metric alone; `loss`: the lowest one (None:
    none yet); `gained`: the last round with a better version than all before.
    """

    best: Round | None = None
    peak: Round | None = None
    loss: float | None = None
    gained: Integer = 0


class Candidate(Struct, frozen=True, kw_only=True):
    """A model that the run has trained, in rounds from `spec.first_round` on, and its first weights
    and card. `because`: why it has ended."""

    model: Model
    spec: RunSpec
    first: _Line = ""
    card: SchemaCard | None = None
    standing: Standing = Standing()
    because: _Line = ""


class CohortState(Struct, frozen=True, kw_only=True):
    """The peers of one secure sum, and how far it is.

    `request` and `shares`: digests of files in the spool, with the cards and the sealed shares.
    `sharers`, `survivors`: empty before they are fixed. `masked`: the masked updates in the spool.
    """

    kind: _Line
    turn: Integer
    peers: _Peers
    request: _Line
    sharers: _Peers = ()
    shares: _Line = ""
    masked: _ByPeer[_Line] = {}
    survivors: _Peers = ()

    @property
    def step(self) -> WorkKind:
        """The next request to its peers."""
        if not self.sharers:
            return "share"
        return "agree" if self.survivors else "mask"


class Assignment(Struct, frozen=True):
    """Training of one peer on `base`, the version before `round`. `lost` while it is offline."""

    round: Integer
    base: _Line
    turn: Integer = 0
    lost: bool = False


#: The API encodes runs: these fields keep the names that older versions know.
_WIRE_NAMES = {
    "num_eligible": "eligible",
    "training_seconds": "needed",
    "head_intact": "whole",
    "target_version": "sought",
    "assignments": "given",
    "last_assignments": "last",
    "cooling_down": "resting",
}


class Run(Struct, frozen=True, kw_only=True, rename=_WIRE_NAMES):
    """The state of a run.

    `since`: its start, Unix s. `first`: its first weights; `head`: its newest version; `parent`:
    the base of the open round; `best`: the best closed round; `standing`: of the present model.
    `described`, `card`, `preprocessing`: what each peer described before round 1, and the schema
    card and preprocessing that followed from it; `surveyed`: with `spec.check`, the first
    description of each peer's data.
    `scores`, `scores_missing`: while the run compares models, what each peer told of them, or why
    it could not; `choice`: the model that the run chose.
    With several models (`runs.candidates`): `trained`: those before the present one; `upcoming`:
    those after it; `ordered`: the settings before a model was chosen.
    `training_seconds`: by peer, the durations of its last trainings.
    `refused`: refused updates of this round, `refusals` of the whole run. `last_refusal` is a text
    for people; `refusal_kinds`: the kind of each peer's last refusal (`messages.refusals`);
    `refusal_texts`: by peer, why it takes no part; without those that have answered since.
    `recalling`: the run is fetching its versions from its peers; `holdings`: what they have;
    `target_version`: the version to fetch; `head_intact`: the ledger's newest version is on disk.
    `buffer`: late updates that go into the next version; with `buffered`, all of its updates.
    `assignments` and `last_assignments`, by peer: work in progress, and the last that was assigned.
    `cooling_down`: peers that get no work before the next version. `excluded`: no work at all.
    `abandoned`: rounds that a return to an earlier version undid, while their files may exist.
    `declared`: by peer, the examples that it trains on and that it holds out, at most: those that
    it declared before round 1, else those of its first claims (0: not known yet).
    `limited`: peers that counted less in a version; `limited_now`: in the newest one.
    `evaluations`: by peer, its last evaluation in a closed round. `comparisons`: by peer, what it
    told after the end; `num_compared`: how many have.
    `late`: with `folds_late`, by peer, the closed round for which its update is still awaited.
    `num_asked`: peers that were asked when the round was opened. `num_spent`: the versions with
    noise for whole peers that the run has made, with those of rounds that were repeated.
    `deleted`: the files are deleted, and the run is not listed any more.
    Secure: `cohort`: the sum in progress. `turn`: how often the work of peers was begun again, over
    all rounds; `lost_cohorts`: how often in this round.
    """

    id: _Line
    spec: RunSpec
    since: Time = 0.0
    state: RunState = RunState.WAITING
    round: Integer = 0
    first: _Line = ""
    head: _Line = ""
    parent: _Line = ""
    described: _ByPeer[Description] = {}
    surveyed: _ByPeer[Description] = {}
    preprocessing: Annotated[str, Meta(max_length=256 * 1024)] = ""
    card: SchemaCard | None = None
    scores: _ByPeer[ModelScores] = {}
    scores_missing: _ByPeer[_Line] = {}
    choice: ModelChosen | None = None
    trained: Annotated[tuple[Candidate, ...], Meta(max_length=64)] = ()
    upcoming: Annotated[tuple[Model, ...], Meta(max_length=len(MODELS))] = ()
    ordered: RunSpec | None = None
    num_eligible: Integer = 0
    peers: _ByPeer[PeerStatus] = {}
    updates: _ByPeer[Update] = {}
    contributors: _Peers = ()
    evaluating: bool = False
    refused: Integer = 0
    refusals: Integer = 0
    last_refusal: _Line = ""
    last_refused: _Line = ""
    refusal_kinds: _ByPeer[_Line] = {}
    refusal_texts: _ByPeer[_Line] = {}
    norms: _ByPeer[float] = {}
    history: _Rounds = ()
    best: Round | None = None
    standing: Standing = Standing()
    abandoned: _Rounds = ()
    strategy_state: _ByName[_Line] = {}
    training_seconds: _ByPeer[Annotated[tuple[float, ...], Meta(max_length=1024)]] = {}
    recalling: bool = False
    head_intact: bool = False
    holdings: _ByPeer[Holding | None] = {}
    target_version: Holding | None = None
    assignments: _ByPeer[Assignment] = {}
    last_assignments: _ByPeer[Assignment] = {}
    buffer: Annotated[tuple[UpdateAccepted, ...], Meta(max_length=MAX_PEERS)] = ()
    cooling_down: Annotated[frozenset[_Line], Meta(max_length=MAX_PEERS)] = frozenset()
    excluded: Annotated[frozenset[_Line], Meta(max_length=MAX_PEERS)] = frozenset()
    staleness: _ByPeer[Integer] = {}
    num_examples: Integer = 0
    on_time: _Peers = ()
    late: _ByPeer[Integer] = {}
    declared: _ByPeer[tuple[Integer, Integer]] = {}
    limited: Annotated[frozenset[_Line], Meta(max_length=MAX_PEERS)] = frozenset()
    limited_now: _ByPeer[float] = {}
    evaluations: _ByPeer[Evaluation] = {}
    comparisons: _ByPeer[Comparison] = {}
    num_compared: Integer = 0
    num_asked: Integer = 0
    num_spent: Integer = 0
    ended_in: RunState = RunState.WAITING
    ended_because: _Line = ""
    deleted: bool = False
    cohort: CohortState | None = None
    turn: Integer = 0
    lost_cohorts: Integer = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def ended_briefly(self) -> str:
        """Why it has ended, without the refusal that was reported before."""
        refusal = f": {self.last_refusal}" if self.last_refusal else ""
        return self.ended_because.removesuffix(refusal)

    @property
    def buffered(self) -> bool:
        """True in the mode "buffered"."""
        return self.spec.mode == "buffered"

    @property
    def folds_late(self) -> bool:
        """True if late updates count in the next version."""
        return self.spec.late == "fold"

    @property
    def begun(self) -> int:
        """The number of the first weights of a further model; 0 while the first one trains."""
        return self.spec.first_round - 1 if self.ordered is not None else 0

    @property
    def own_rounds(self) -> tuple[Round, ...]:
        """The closed rounds of the present model."""
        if not self.begun:
            return self.history
        at = bisect_left(self.history, self.spec.first_round, key=lambda closed: closed.round)
        return self.history[at:]

    @property
    def num_versions(self) -> int:
        """The number of the newest version. It counts those that the run has made, and the first
        weights of each model but the first."""
        is_made = self.state in (RunState.WAITING, RunState.EVALUATING)
        return self.round if is_made else self.round - 1

    @property
    def describing(self) -> bool:
        """True before the peers have agreed on a schema."""
        return self.spec.handshake and self.card is None and self.round < self.spec.first_round

    @property
    def comparing(self) -> bool:
        """True while the run has to choose its model, and the tables are agreed on."""
        spec = self.spec
        is_known = bool(self.preprocessing or spec.settings.get("preprocessing"))
        return self.describing and is_known and is_open(spec.task, spec.settings) and not spec.only

    @property
    def described_base(self) -> str:
        """The base of a request to describe. It differs between requests, so that a late answer
        cannot count for another one."""
        if self.comparing:
            return preprocessing.digest(f"{AUTO} {self.preprocessing}")
        return preprocessing.digest(self.preprocessing)

    @property
    def kind(self) -> WorkKind:
        """The kind of request that peers get in this state."""
        if self.cohort is not None:
            return self.cohort.step
        if self.recalling:
            return "recall" if self.target_version else "holdings"
        if self.state is RunState.WAITING:
            return "describe" if self.describing else "init"
        return "train" if self.state is RunState.TRAINING else "evaluate"

    @property
    def open_kinds(self) -> tuple[str, ...]:
        """The kinds of request that peers may have in this state."""
        return (self.kind, "unmask") if self.cohort and self.cohort.survivors else (self.kind,)

    @property
    def pending(self) -> tuple[str, ...]:
        """Peers whose reply is awaited, in order of their ids."""
        return tuple(sorted(p for p, status in self.peers.items() if status == "asked"))


#: The owner of the files of a cohort in the spool. It is no peer's id.
COHORT = "cohort"


def accepted_uploads(run: Run) -> set[tuple[str, str]]:
    """Peers and digests of the accepted updates that no version contains yet.

    Secure: first the cards of the peers, then the files of the cohort.
    """
    if (cohort := run.cohort) is not None:
        files = {(COHORT, digest) for digest in (cohort.request, cohort.shares) if digest}
        kept = cohort.survivors or cohort.masked
        return files | {(peer, cohort.masked[peer]) for peer in kept}
    accepted = [*run.updates.items(), *((one.peer, one.update) for one in run.buffer)]
    return {(peer, update.digest) for peer, update in accepted if update.digest}
