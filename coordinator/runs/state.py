"""A run: where it stands, and what it remembers of its rounds. Pure.

Facts change it (`coordinator.runs.transitions`), and `coordinator.runs.decisions` says what it does
next.
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

#: Words for refusals that a run remembers.
TOO_STALE, TOO_FEW = "too stale", "too few examples"


class Round(Struct, frozen=True, kw_only=True):
    """A closed round; `spread` has by metric the least, the median and the most of all peers,
    `worst` the peer that is served worst. `num_examples`: of all contributors together."""

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
    worst: dict[str, str] = {}
    tallies: dict[str, list[float]] = {}
    spent: dict[str, float] = {}
    staleness: dict[str, int] = {}
    num_examples: int = 0
    num_evaluated: int = 0


class Assignment(Struct, frozen=True):
    """Buffered: the training that a peer has in hand; `lost` while it is away."""

    round: int
    base: str
    turn: int = 0
    lost: bool = False


class Run(Struct, frozen=True, kw_only=True):
    """Where a run stands. It was started at `since` (Unix s). `first` are its first weights, `head`
    is the newest version; `best` the best by `merit`. `card` is what its peers have alike, once
    they have `described` themselves; `preprocessing`, how their rows become numbers, where a task
    needs that.
    `needed`: by peer, seconds that its last answers to training took.
    `refused` counts the refusals of this round, `refusals` those of the whole run.
    `recalling`: its versions are sought at its peers; `holdings` are theirs.

    `buffer`: late updates that go into the next version.

    Buffered: `given` is the work in hand and `last` the last that was given, both by peer; `buffer`
    all updates of the next version; `resting` peers get nothing before that is made. `excluded`
    get nothing at all.

    `deleted`: its files are gone, and it is listed no more."""

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
    norms: dict[str, float] = {}
    history: tuple[Round, ...] = ()
    best: Round | None = None
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
    ended_in: RunState = RunState.WAITING
    ended_because: str = ""
    deleted: bool = False

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def buffered(self) -> bool:
        """True if no peer waits for another."""
        return self.spec.mode == "buffered"

    @property
    def num_versions(self) -> int:
        """How many versions there are, the first weights not counted."""
        made = self.state in (RunState.WAITING, RunState.EVALUATING)
        return self.round if made else self.round - 1

    @property
    def describing(self) -> bool:
        """True while it is not known what the peers have alike."""
        return self.spec.handshake and self.card is None and self.round < self.spec.first_round

    @property
    def kind(self) -> WorkKind:
        """What peers are asked for in this state."""
        if self.recalling:
            return "recall" if self.target_version else "holdings"
        if self.state is RunState.WAITING:
            return "describe" if self.describing else "init"
        return "train" if self.state is RunState.TRAINING else "evaluate"

    @property
    def pending(self) -> tuple[str, ...]:
        """Peers whose answer is awaited, in name order."""
        return tuple(sorted(p for p, standing in self.peers.items() if standing == "asked"))
