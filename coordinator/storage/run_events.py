"""A run's events, as the ledger stores them. Pure.

Events are in the past tense. New fields need a default, because old ledgers must stay readable.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from coordinator.storage.run_spec import RunSpec as RunSpec
from protocols.messages.comparisons import Comparison
from protocols.messages.envelope import Integer, Metrics, Tallies
from protocols.messages.states import RunState
from protocols.model.schema_card import Description, SchemaCard
from protocols.tables.model_scores import MAX_ASKED, MODELS, Model, ModelScores

#: Without a pattern: ledgers of older versions have any text.
_ShortText = Annotated[str, Meta(max_length=400)]
_T = TypeVar("_T")
_ByModel = Annotated[dict[Model, _T], Meta(max_length=len(MODELS))]


class RunEvent(Struct, frozen=True, tag=True):
    """An entry of the ledger about a run; each kind is a subclass."""


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


class ModelsCompared(RunEvent, frozen=True):
    """With `model=auto`, a peer told how well each model predicts its own rows."""

    peer: _ShortText
    scores: ModelScores


class ScoresMissing(RunEvent, frozen=True):
    """A peer could not compare the models. It takes part in the run, not in the choice."""

    peer: _ShortText
    reason: _ShortText
    detail: _ShortText


class ModelChosen(RunEvent, frozen=True, kw_only=True):
    """The run trains `model`, with the settings `spec` from now on, and the models of `then` after
    it, each from first weights (`ModelBegun`).

    `scores`: of each candidate, the mean of `metric` over `rows` rows of these `peers`; empty if
    the model was chosen without scores, for the reason `because`. `left_out`: models that were no
    candidates, and why.
    """

    model: Model
    spec: RunSpec
    metric: _ShortText = ""
    scores: _ByModel[float] = {}
    rows: Integer = 0
    peers: Annotated[tuple[_ShortText, ...], Meta(max_length=MAX_ASKED)] = ()
    left_out: _ByModel[_ShortText] = {}
    because: _ShortText = ""
    then: Annotated[tuple[Model, ...], Meta(max_length=len(MODELS))] = ()


class ModelBegun(RunEvent, frozen=True):
    """The run trains another model, with the settings `spec` from now on. The same model again: no
    version of it is left.

    `round`: the number of its first weights, after that of the last round. `because`: why the model
    before it has ended.
    """

    model: Model
    spec: RunSpec
    round: Integer
    because: _ShortText = ""


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


class PeerCompared(RunEvent, frozen=True):
    """After the end, a peer told how good models are on its own held-out rows."""

    peer: str
    comparison: Comparison


#: The kind of each event in the ledger is its class's name: renaming a class needs a `tag`.
encode = msgspec.json.Encoder().encode
decode: Callable[[bytes], RunEvent] = msgspec.json.Decoder(
    functools.reduce(operator.or_, RunEvent.__subclasses__())
).decode
