"""A run's settings and events, as the ledger stores them. Pure.

Events are in the past tense. New fields need a default, because old ledgers must stay readable.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.messages.envelope import Count, Integer, Metrics, Settings, Tallies
from protocols.messages.states import RunState
from protocols.model.schema_card import Description, SchemaCard
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.secagg.messages import masked_codec
from protocols.privacy.user_level import PrivateVersions

Setting = str | int | float | bool
#: Without a pattern: ledgers of older versions have any text.
_ShortText = Annotated[str, Meta(max_length=400)]


class RunEvent(Struct, frozen=True, tag=True):
    """An entry of the ledger about a run; each kind is a subclass."""


class RunSpec(Struct, frozen=True, kw_only=True):
    """The settings of a run. They are set at its start and never change.

    `deadline_s`: counts from the start of a round's training, and again from that of its
    evaluation. If it passes without the quorum, all peers that could help are asked again, and it
    starts anew. Time with a full disk does not count. With `deadline` "auto" it is derived from
    earlier rounds and `deadline_s` is its maximum (`decisions.phase_deadline_s`).
    `select`: how many peers are asked, as a multiple of the quorum (1.2: a fifth more than needed);
    the round then continues as soon as it has its quorum. 0: all are asked and awaited.
    `late`: what happens to an update whose round has closed (`coordinator.runs.late_updates`).
    `keep_versions`: how many of the newest versions stay on disk, in addition to the best one.
    `codec`: how updates are compressed, one of `protocols.codecs.registry`.
    `weighting`: updates count by their examples, or all the same.
    `clip_norm`: the maximum Euclidean norm of an update's change (0: none).
    `outlier_limit`: how many times as far as the median peer one may pull a version
    (`strategies.outliers`; 0: no limit, as in old ledgers).
    `handshake`: before round 1, peers compare schema and preprocessing. Old ledgers lack it.
    `best_metric`: the metric that decides which version is best (empty: accuracy, else loss);
    `best_direction`: whether higher is better (empty: decided by the metric's name). The run ends
    early when the metric reaches `target`, or has not improved for `patience` rounds (0: never).
    `mode` "buffered" (FedBuff, arXiv 2106.06639): peers do not wait for each other. Each has an
    assignment of its own, `concurrency` of them at a time (0: all), and `buffer` updates make a
    version. An update that is up to `max_staleness` versions behind counts 1/√(1 + staleness),
    times `server_lr`.
    `min_examples`: a peer that trains on fewer examples gets no work from this run.
    `dp_epsilon`, `dp_delta`: each peer adds noise of its own, so that all rounds together cost at
    most that for one of its rows (0: no noise). `dp_clip`: the maximum norm of a row's gradient.
    `dp_shared`: so many honest peers of a secure sum add the noise together (0 or 1: each peer adds
    all of it).
    `dp_user_epsilon`: the coordinator adds noise to each version, so that all versions together
    cost at most that, with `dp_delta`, for one peer (0: no noise).
    `secure`: the coordinator sees no single update, only their sum (`coordinator.runs.secure`).
    `only`: the single part that a parent fleet requests from this one (empty: all parts), in the
    parent's round `first_round`. `check`: a run of only the part `describe` that keeps what
    each peer described, for `commonweight run check`.
    """

    task: _ShortText
    rounds: Count
    first_round: Count = 1
    only: Literal["", "describe", "init", "train", "evaluate"] = ""
    strategy: _ShortText = "fedavg"
    strategy_args: Settings = {}
    settings: Settings = {}
    codec: _ShortText = "fp32"
    seed: Integer = 0
    quorum: Integer = 1
    deadline_s: float = 600.0
    deadline: Literal["fixed", "auto"] = "fixed"
    select: float = 0.0
    late: Literal["drop", "fold"] = "drop"
    keep_versions: Integer = 2
    weighting: Literal["examples", "equal"] = "examples"
    max_weight_share: float = 1.0
    max_examples: Integer = 10_000_000
    min_examples: Integer = 1
    clip_norm: float = 0.0
    outlier_limit: float = 0.0
    handshake: bool = False
    best_metric: _ShortText = ""
    best_direction: Literal["", "max", "min"] = ""
    patience: Integer = 0
    target: float | None = None
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer: Integer = 0
    max_staleness: Integer = 10
    concurrency: Integer = 0
    server_lr: float = 1.0
    check: bool = False
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    dp_clip: float = 1.0
    dp_shared: Integer = 0
    dp_user_epsilon: float = 0.0
    secure: bool = False

    @property
    def private(self) -> PrivateTraining | None:
        """What the run asks of peers that add noise; None without noise."""
        if not self.dp_epsilon:
            return None
        shared = max(1, self.dp_shared)
        return PrivateTraining(self.dp_epsilon, self.dp_delta, self.dp_clip, self.rounds, shared)

    @property
    def private_versions(self) -> PrivateVersions | None:
        """What the run's versions may cost for each peer; None without noise in them."""
        if not self.dp_user_epsilon:
            return None
        rounds = self.rounds - self.first_round + 1
        return PrivateVersions(self.dp_user_epsilon, self.dp_delta, rounds)

    @property
    def measures(self) -> bool:
        """False for a run with noise, in which no metric may show what noise hides."""
        return self.private is None and self.private_versions is None

    @property
    def work_codec(self) -> str:
        """The codec that peers are told. Raises UsageError if a secure run cannot use it."""
        return masked_codec(self.codec) if self.secure else self.codec


class Update(Struct, frozen=True, kw_only=True):
    """An accepted reply. `digest` is empty for an evaluation.

    `seconds`: from the request to the reply (0 in old ledgers). Buffered and late updates also
    have `base`, the version they were trained on, `turn` as in `WorkGiven`, and `staleness`, the
    number of versions made since. `claimed`: the examples that the peer claimed, if these are more
    than it declared; `num_examples` are the declared ones then.
    """

    digest: _ShortText = ""
    nbytes: Integer = 0
    num_examples: Integer
    claimed: Integer = 0
    metrics: Metrics = {}
    tallies: Tallies = {}
    norm: float = 0.0
    seconds: float = 0.0
    base: _ShortText = ""
    turn: Integer = 0
    staleness: Integer = 0


class RunStarted(RunEvent, frozen=True):
    """`at`: Unix s; 0 in old ledgers."""

    spec: RunSpec
    at: float = 0.0


class PeerDescribed(RunEvent, frozen=True):
    """Before round 1, a peer described its model or the statistics of its table.

    `num_examples` and `num_held_out`: the data that it declares, which bound later claims (0: not
    declared).
    """

    peer: str
    description: Description
    num_examples: int = 0
    num_held_out: int = 0


class PreprocessingFixed(RunEvent, frozen=True):
    """The preprocessing of tables, derived from the statistics of these peers, as encoded text."""

    text: str
    peers: tuple[str, ...]


class SchemaAgreed(RunEvent, frozen=True):
    """The card of most peers. Peers with a different card get no work from this run."""

    card: SchemaCard


class WeightsInitialised(RunEvent, frozen=True):
    """The run has its first version. `by`: the peer that made it, or "file"."""

    digest: str
    by: str


class RoundOpened(RunEvent, frozen=True):
    """`eligible`: how many peers could have been asked (0: not counted)."""

    round: int
    base: str
    asked: tuple[str, ...]
    eligible: int = 0


class WorkGiven(RunEvent, frozen=True):
    """Buffered: a peer was assigned training on `base`, the version before `round`.

    `turn`: how many times it was assigned this version before.
    """

    peer: str
    round: int
    base: str
    turn: int = 0


class PeersAsked(RunEvent, frozen=True):
    """More peers, or lost peers that came back, were asked for the work of the open round."""

    peers: tuple[str, ...]


class PeerLost(RunEvent, frozen=True):
    """A peer that was asked has disconnected or cannot do the work."""

    peer: str
    reason: str


class UpdateAccepted(RunEvent, frozen=True):
    round: Integer
    peer: _ShortText
    update: Update


class UpdateRefused(RunEvent, frozen=True):
    """`round`, `kind` and `seconds` are those of the request, which may be older than the round."""

    round: int
    peer: str
    reason: str
    detail: str
    kind: str = ""
    seconds: float = 0.0


class TrainingClosed(RunEvent, frozen=True):
    """The round accepts no more updates. Those of `contributors` are summed, in this order."""

    round: int
    contributors: tuple[str, ...]


class PrivacySpent(RunEvent, frozen=True):
    """The next event commits a version with noise, for which no round is repeated free of charge.

    `noise`: the standard deviation of the sum over `clip`, the most that one peer changes it.
    `peers`: the number by which the sum was divided.
    """

    round: int
    noise: float
    clip: float
    peers: int


class CohortFixed(RunEvent, frozen=True):
    """Secure: these peers take part in a sum; `kind`: "train" or "evaluate".

    `request`: the digest of the file with the plan and the cards of all (`ShareRequest`).
    """

    round: int
    turn: int
    kind: str
    peers: tuple[str, ...]
    request: str


class SharersFixed(RunEvent, frozen=True):
    """Secure: these peers have shared their secrets; `shares`: the digest of the file of them."""

    round: int
    sharers: tuple[str, ...]
    shares: str


class MaskedUpdateAccepted(RunEvent, frozen=True):
    """Secure: the masked update of a peer is in the spool."""

    round: int
    peer: str
    digest: str
    nbytes: int


class SurvivorsFixed(RunEvent, frozen=True):
    """Secure: the sum contains the masked updates of these peers and of no others."""

    round: int
    survivors: tuple[str, ...]


class CohortLost(RunEvent, frozen=True):
    """Secure: no sum can be known. Training is repeated; an evaluation ends without metrics."""

    round: int
    because: str


class VersionCommitted(RunEvent, frozen=True):
    """`strategy_state`: digests, by slot, of the strategy's state after this version.

    `limited`: peers whose updates counted less, and how many times the median they pulled.
    """

    round: int
    digest: str
    parent: str
    contributors: tuple[str, ...]
    metrics: Metrics
    strategy_state: dict[str, str] = {}
    limited: dict[str, float] = {}


class VersionLost(RunEvent, frozen=True):
    """The newest version is damaged on disk. The run continues from `to`, an earlier one."""

    digest: str
    to: str


class Holding(Struct, frozen=True):
    """A version that a peer has proved to have: its number in the run, and its digest."""

    round: Integer
    digest: _ShortText


class RecallBegun(RunEvent, frozen=True):
    """The ledger was restored from a backup. Peers may have newer versions.

    `whole`: the backup's newest version is on disk.
    """

    whole: bool


class HoldingTold(RunEvent, frozen=True):
    """A peer proved which version it has, or reported that it has none."""

    peer: str
    holding: Holding | None


class VersionSought(RunEvent, frozen=True):
    """The run fetches this version from a peer."""

    version: Holding


class VersionRecalled(RunEvent, frozen=True):
    """The run continues from this version. `by`: the peer it came from, or "backup"."""

    version: Holding
    by: str
    strategy_state: dict[str, str] = {}


class EvaluationOpened(RunEvent, frozen=True):
    round: int
    asked: tuple[str, ...]


class RoundClosed(RunEvent, frozen=True):
    """`seconds` since the round was opened. `metrics`: the federated evaluation, may be empty.

    `decisive`: values that decide instead of those in `metrics`: means of the peers in the middle.
    `spent`: seconds by phase of the round: `work` until the first update, `wait` for the others,
    `aggregate`, `evaluate`.
    """

    round: int
    metrics: Metrics
    seconds: float
    bytes_up: int
    bytes_down: int
    spent: dict[str, float] = {}
    tallies: dict[str, list[float]] = {}
    decisive: Metrics = {}


class RunEnded(RunEvent, frozen=True):
    state: RunState
    because: str


class RunResumed(RunEvent, frozen=True):
    """A stopped or failed run continues. Its interrupted round is repeated."""


class RunDeleted(RunEvent, frozen=True):
    """The files of an ended run were deleted: these versions and states, `nbytes` in total."""

    versions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    nbytes: int = 0


#: The kind of each event in the ledger is its class's name: renaming a class needs a `tag`.
encode = msgspec.json.Encoder().encode
decode: Callable[[bytes], RunEvent] = msgspec.json.Decoder(
    functools.reduce(operator.or_, RunEvent.__subclasses__())
).decode
