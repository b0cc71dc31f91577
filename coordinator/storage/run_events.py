"""What happens to a run: its settings and its events, as the ledger keeps them. Pure.

Facts are in the past tense. A new field has a default: old ledgers are read for ever.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from protocols.messages.envelope import Metrics
from protocols.messages.states import RunState
from protocols.model.schema_card import Description, SchemaCard

Setting = str | int | float | bool


class RunSpec(Struct, frozen=True, kw_only=True):
    """What was asked for at the start; part of the run's record and never changed.

    `deadline_s` counts from the opening of a round's training, and again of its evaluation. When it
    passes without the quorum, whoever could help is asked, or asked again, and it counts anew.
    With `deadline` "auto" it is at most that, and as long as peers needed before
    (`decisions.deadline_s`).
    `select`: how many peers are asked, in quorums (1.2: a fifth more than are needed); a round then
    goes on as soon as the quorum is there. 0: all are asked, and all are waited for.
    `late`: what becomes of an update whose round has closed (`coordinator.runs.late_updates`).
    `keep_versions`: how many of the newest stay on disk, beside the best.
    `codec`: how updates are made smaller, one of `protocols.codecs.registry`.
    `weighting`: updates count by their examples, or all the same. `clip_norm` (0: off) bounds how
    far, as a Euclidean norm, one update may move the weights. `handshake`: before round 1 all peers
    compare what must be alike; runs of older ledgers did not.
    `best_metric` says which version is best (empty: accuracy, else loss), and `best_direction`
    whether more of it is better (empty: as its name says). The run ends early when the metric has
    reached `target`, or has not become better for `patience` rounds (0: never).
    In the mode "buffered" (FedBuff, arXiv 2106.06639) no peer waits for another: each has work of
    its own, `concurrency` of them at a time (0: all), and `buffer` updates make a version. One that
    is `max_staleness` versions behind or less counts 1/√(1 + staleness), times `server_lr`.
    `min_examples`: a peer that trains on fewer gets no work of this run.
    `only` (empty: all): the one part of a run that a fleet further up asks this one for, in its own
    round `first_round`.
    """

    task: str
    rounds: int
    first_round: int = 1
    only: Literal["", "describe", "init", "train", "evaluate"] = ""
    strategy: str = "fedavg"
    strategy_args: dict[str, Setting] = {}
    settings: dict[str, Setting] = {}
    codec: str = "fp32"
    seed: int = 0
    quorum: int = 1
    deadline_s: float = 600.0
    deadline: Literal["fixed", "auto"] = "fixed"
    select: float = 0.0
    late: Literal["drop", "fold"] = "drop"
    keep_versions: int = 2
    weighting: Literal["examples", "equal"] = "examples"
    max_weight_share: float = 1.0
    max_examples: int = 10_000_000
    min_examples: int = 1
    clip_norm: float = 0.0
    handshake: bool = False
    best_metric: str = ""
    best_direction: Literal["", "max", "min"] = ""
    patience: int = 0
    target: float | None = None
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer: int = 0
    max_staleness: int = 10
    concurrency: int = 0
    server_lr: float = 1.0


class Update(Struct, frozen=True, kw_only=True):
    """An accepted answer: what was claimed and checked. `digest` is empty for an evaluation.

    `seconds`: from the question to the answer (0 in old ledgers). Buffered, and of a late one:
    `base` is the version that it was trained on, `turn` as in `WorkGiven`, `staleness` how many
    versions came since.
    """

    digest: str = ""
    nbytes: int = 0
    num_examples: int
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    norm: float = 0.0
    seconds: float = 0.0
    base: str = ""
    turn: int = 0
    staleness: int = 0


class RunStarted(Struct, frozen=True, tag=True):
    """`at`: Unix s; 0 in ledgers of before."""

    spec: RunSpec
    at: float = 0.0


class PeerDescribed(Struct, frozen=True, tag=True):
    """Before round 1 a peer told what of its data and model must be alike on all."""

    peer: str
    description: Description


class PreprocessingFixed(Struct, frozen=True, tag=True):
    """From the surveys of these peers follows how rows become numbers, as text of its own."""

    text: str
    peers: tuple[str, ...]


class SchemaAgreed(Struct, frozen=True, tag=True):
    """The card of most peers: who has another one gets no work of this run."""

    card: SchemaCard


class WeightsInitialised(Struct, frozen=True, tag=True):
    """The first version is there; `by` is the peer that made it, or the file it came from."""

    digest: str
    by: str


class RoundOpened(Struct, frozen=True, tag=True):
    """`eligible`: how many peers could have been asked (0 where nobody counted them)."""

    round: int
    base: str
    asked: tuple[str, ...]
    eligible: int = 0


class WorkGiven(Struct, frozen=True, tag=True):
    """Buffered: a peer was given training of its own, on the version `base` before `round`.

    `turn`: how many times it was given this version before.
    """

    peer: str
    round: int
    base: str
    turn: int = 0


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
    """`round`, `kind` and `seconds` are of the question: a late answer settles no newer one."""

    round: int
    peer: str
    reason: str
    detail: str
    kind: str = ""
    seconds: float = 0.0


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


class Holding(Struct, frozen=True):
    """A version that a peer has proven to hold: its number in the run, and its digest."""

    round: int
    digest: str


class RecallBegun(Struct, frozen=True, tag=True):
    """The ledger is a backup: versions newer than its newest may be with the peers.

    `whole`: the backup's own newest version is on disk.
    """

    whole: bool


class HoldingTold(Struct, frozen=True, tag=True):
    """A peer told which version it holds, and proved it; or that it holds none."""

    peer: str
    holding: Holding | None


class VersionSought(Struct, frozen=True, tag=True):
    """This version is to come back from a peer."""

    version: Holding


class VersionRecalled(Struct, frozen=True, tag=True):
    """The run goes on from this version. `by` is the peer it came from, or "backup"."""

    version: Holding
    by: str
    strategy_state: dict[str, str] = {}


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
    tallies: dict[str, list[float]] = {}


class RunEnded(Struct, frozen=True, tag=True):
    state: RunState
    because: str


class RunResumed(Struct, frozen=True, tag=True):
    """A run that was stopped or has failed goes on; the round that was cut off is done again."""


class RunDeleted(Struct, frozen=True, tag=True):
    """An ended run's files were deleted: these versions and states, of so many bytes in all."""

    versions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    nbytes: int = 0


RunEvent = (
    RunStarted
    | PeerDescribed
    | PreprocessingFixed
    | SchemaAgreed
    | WeightsInitialised
    | RoundOpened
    | WorkGiven
    | PeersAsked
    | PeerLost
    | UpdateAccepted
    | UpdateRefused
    | TrainingClosed
    | VersionCommitted
    | VersionLost
    | RecallBegun
    | HoldingTold
    | VersionSought
    | VersionRecalled
    | EvaluationOpened
    | RoundClosed
    | RunEnded
    | RunResumed
    | RunDeleted
)

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(RunEvent).decode
