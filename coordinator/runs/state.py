"""The state of a run, and what it remembers of its closed rounds. Pure.

Events change it (`runs.transitions`), and `runs.decisions` says what comes next.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from coordinator.storage.run_events import Holding, RunSpec, Update, UpdateAccepted
from protocols.messages.envelope import Metrics
from protocols.messages.states import ENDED, RunState
from protocols.messages.work import WorkKind
from protocols.model.schema_card import Description, SchemaCard

PeerStatus = Literal["asked", "answered", "refused", "lost"]

#: Reasons of refusals that have consequences in later rounds.
TOO_STALE, TOO_FEW = "too stale", "too few examples"


class Round(Struct, frozen=True, kw_only=True):
    """A closed round. `norms` and `staleness` are by peer, `spent` is seconds by phase.

    `on_time`: contributors with an update for this round; the others only had late ones.

    By metric: `spread` has the minimum, median and maximum over all peers, `worst` the peer with
    the worst value. `num_examples`: of all contributors together.
    """

    round: int
    digest: str
    contributors: tuple[str, ...] = ()
    refused: int = 0
    metrics: Metrics = {}
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    norms: dict[str, float] = {}
    strategy_state: dict[str, str] = {}
    spread: dict[str, tuple[float, float, float]] = {}
    worst: dict[str, str] = {}
    tallies: dict[str, list[float]] = {}
    spent: dict[str, float] = {}
    staleness: dict[str, int] = {}
    num_examples: int = 0
    num_evaluated: int = 0
    on_time: tuple[str, ...] = ()


class Assignment(Struct, frozen=True):
    """Training of one peer on `base`, the version before `round`. `lost` while it is offline."""

    round: int
    base: str
    turn: int = 0
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
    the base of the open round; `best`: the best closed round.
    `described`, `card`, `preprocessing`: what each peer described before round 1, and the schema
    card and preprocessing that followed from it.
    `training_seconds`: by peer, the durations of its last trainings.
    `refused`: refused updates of this round, `refusals` of the whole run. `last_refusal` is a text
    for people; `refusal_kinds`: the kind of each peer's last refusal (`messages.refusals`).
    `recalling`: the run is fetching its versions from its peers; `holdings`: what they have;
    `target_version`: the version to fetch; `head_intact`: the ledger's newest version is on disk.
    `buffer`: late updates that go into the next version; with `buffered`, all of its updates.
    `assignments` and `last_assignments`, by peer: work in progress, and the last that was assigned.
    `cooling_down`: peers that get no work before the next version. `excluded`: no work at all.
    `abandoned`: rounds that a return to an earlier version undid, while their files may exist.
    `deleted`: the files are deleted, and the run is not listed any more.
    """

    id: str
    spec: RunSpec
    since: float = 0.0
    state: RunState = RunState.WAITING
    round: int = 0
    first: str = ""
    head: str = ""
    parent: str = ""
    described: dict[str, Description] = {}
    preprocessing: str = ""
    card: SchemaCard | None = None
    num_eligible: int = 0
    peers: dict[str, PeerStatus] = {}
    updates: dict[str, Update] = {}
    contributors: tuple[str, ...] = ()
    evaluating: bool = False
    refused: int = 0
    refusals: int = 0
    last_refusal: str = ""
    last_refused: str = ""
    refusal_kinds: dict[str, str] = {}
    norms: dict[str, float] = {}
    history: tuple[Round, ...] = ()
    best: Round | None = None
    abandoned: tuple[Round, ...] = ()
    strategy_state: dict[str, str] = {}
    training_seconds: dict[str, tuple[float, ...]] = {}
    recalling: bool = False
    head_intact: bool = False
    holdings: dict[str, Holding | None] = {}
    target_version: Holding | None = None
    assignments: dict[str, Assignment] = {}
    last_assignments: dict[str, Assignment] = {}
    buffer: tuple[UpdateAccepted, ...] = ()
    cooling_down: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    staleness: dict[str, int] = {}
    num_examples: int = 0
    on_time: tuple[str, ...] = ()
    ended_in: RunState = RunState.WAITING
    ended_because: str = ""
    deleted: bool = False

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
    def num_versions(self) -> int:
        """How many versions the run has made, without the first weights."""
        is_made = self.state in (RunState.WAITING, RunState.EVALUATING)
        return self.round if is_made else self.round - 1

    @property
    def describing(self) -> bool:
        """True before the peers have agreed on a schema."""
        return self.spec.handshake and self.card is None and self.round < self.spec.first_round

    @property
    def kind(self) -> WorkKind:
        """The kind of request that peers get in this state."""
        if self.recalling:
            return "recall" if self.target_version else "holdings"
        if self.state is RunState.WAITING:
            return "describe" if self.describing else "init"
        return "train" if self.state is RunState.TRAINING else "evaluate"

    @property
    def pending(self) -> tuple[str, ...]:
        """Peers whose reply is awaited, in order of their ids."""
        return tuple(sorted(p for p, status in self.peers.items() if status == "asked"))


def accepted_uploads(run: Run) -> set[tuple[str, str]]:
    """Peers and digests of the accepted updates that no version contains yet."""
    accepted = [*run.updates.items(), *((one.peer, one.update) for one in run.buffer)]
    return {(peer, update.digest) for peer, update in accepted if update.digest}
