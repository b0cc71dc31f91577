"""Signed work of a round, signed claims about updates, and the poll that carries them. Pure.

Work and claims are records in Flower messages; a poll request or response carries such messages.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct, field

from protocols.messages.envelope import (
    Count,
    Digest,
    Id,
    Integer,
    MaybeDigest,
    MaybeId,
    Metrics,
    Name,
    Settings,
    Tallies,
    TaskName,
    Text,
)
from protocols.messages.signing import SignedJson
from protocols.messages.version_log import LogNews, SeenBytes

POLL_PATH = "/cw/v1/exchange"
#: `name`: a run, or a task: then its newest run.
MODEL_PATH = "/cw/v1/models/{name}/{which}"
#: A version, from a replica that waits. Not the coordinator's path: the signature of a request
#: covers the path, so the one cannot use a request to the other.
DOWNLOAD_PATH = "/cw/v1/downloads/{digest}"
#: Weights up to this size are sent with the messages, which costs less than another request.
INLINE_MAX_BYTES = 64 * 1024
#: The most fragments of a model that take turns.
MAX_FRAGMENTS = 64

#: Of a Flower message. Weights have requests of their own.
MAX_MESSAGE_BYTES = 1024 * 1024
#: Of the answer to a poll: the message and its objects, and a small version.
MAX_POLL_RESPONSE_BYTES = 2 * MAX_MESSAGE_BYTES
#: A codec, with an argument such as `topk:0.01`.
CodecName = Annotated[str, Meta(max_length=64, pattern=r"^[a-z0-9]{1,16}(:[0-9.e+-]{1,24})?\Z")]
_Bytes = Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]

Which = Literal["best", "latest"]
#: The steps of secure aggregation after "train" or "evaluate": see `privacy.secagg.messages`.
SecureStep = Literal["share", "mask", "agree", "unmask"]
#: Types of Flower messages with a step.
STEP_MESSAGES = frozenset(f"query.{step}" for step in get_args(SecureStep))
WorkKind = Literal["describe", "init", "train", "evaluate", "holdings", "recall", SecureStep]


class Work(Struct, frozen=True, kw_only=True):
    """A piece of work for an agent, signed by the coordinator.

    `base`: digest of the version to work on, of `nbytes` bytes. Both are empty for "init"; for
    "describe" `base` is the digest of the agreed preprocessing, if any. `codec`: for the update.
    `parent`: a version from which a patch of `patch_bytes` (0: none) leads to `base`. `card`: the
    schema that all peers share, a `SchemaCard` as JSON; empty if not known yet. `turn`: how often
    this peer has trained this version before. `since`: when the run was started (Unix s). `cohort`:
    the fewest peers whose updates a version of this run has; 0 from older coordinators. `fleet`:
    the id of the fleet; empty from older ones. `request`: digest of the request of a step of secure
    aggregation, which the message contains. `scores`: an evaluation may have the tally "scores",
    which older coordinators refuse. `choice`: the model that the run has chosen and why, as text
    for the owner. `ahead`: another round follows, and training for it may begin before its
    version is here, from this peer's own weights. `fragments`: the model has this many
    fragments (`model.fragments`), of which an update has one, in turn; 0 or 1: all of it. `begun`:
    the number of the first weights of this model, if the run has trained another one before:
    schedules count rounds from there.
    """

    run: Id
    since: float = 0.0
    round: Count
    kind: WorkKind
    task: TaskName
    base: MaybeDigest = ""
    nbytes: Count = 0
    parent: MaybeDigest = ""
    patch_bytes: Count = 0
    codec: CodecName = "fp32"
    turn: Count = 0
    seed: Integer = 0
    settings: Settings = {}
    card: Annotated[str, Meta(max_length=256 * 1024)] = ""
    deadline_s: float = 0.0
    cohort: Count = 0
    fleet: MaybeId = ""
    request: MaybeDigest = ""
    scores: bool = False
    choice: Text = ""
    ahead: bool = False
    fragments: Annotated[int, Meta(ge=0, le=MAX_FRAGMENTS)] = 0
    begun: Count = 0


class NamedModel(Struct, frozen=True, kw_only=True):
    """The best or newest version of a run: the answer to MODEL_PATH.

    `settings`: what the task needs to predict with it, such as the agreed preprocessing.
    `ended_rounds`: how many rounds the run had, if it has ended; else 0, as of older coordinators.
    `personal_mu`: the weight of the proximal term of a personal model; 0: none. `metric`: by which
    models are compared after the run, empty for the default; `lower_is_better` says how. `choice`:
    which of several models the run has kept, or trains now, as text for the owner; else empty.
    """

    run: Id
    round: Count
    task: TaskName
    digest: Digest
    nbytes: Count
    settings: Settings = {}
    ended_rounds: Count = 0
    personal_mu: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    metric: Name = ""
    lower_is_better: bool = False
    choice: Text = ""


class UpdateClaim(Struct, frozen=True, kw_only=True):
    """A claim about an update, signed by the agent. `turn` is that of the work.

    `base`: the version that it trained on. `digest` and `nbytes` are those of the uploaded file, or
    of the description. `fleet`: the id of the fleet; empty from older agents. `num_held_out` comes
    with a description only: it and `num_examples` are what the peer has for the run, 0 if it does
    not know (older agents).
    """

    run: Id
    round: Count
    kind: WorkKind
    turn: Count = 0
    peer: Id
    base: MaybeDigest
    digest: MaybeDigest
    nbytes: Count
    codec: CodecName = "fp32"
    num_examples: Integer
    num_held_out: Count = 0
    metrics: Metrics = {}
    tallies: Tallies = {}
    nonce: Id
    fleet: MaybeId = ""


class FlowerMessage(Struct, frozen=True, kw_only=True):
    """A Flower message: its protobuf, its object tree, and its objects by digest."""

    message: _Bytes
    tree: _Bytes
    objects: Annotated[dict[Digest, _Bytes], Meta(max_length=1024)]


#: Of one answer to a poll.
MAX_NOTICES = 8


class ChargedHead(Struct, frozen=True):
    """`peer` has `count` entries in its owner's ledger of privacy."""

    peer: Id
    count: Count


#: Of a signed `ChargedHead`.
MAX_CHARGED_BYTES = 512
_ChargedBytes = Annotated[bytes, Meta(max_length=MAX_CHARGED_BYTES)]


class OpenSum(Struct, frozen=True, kw_only=True):
    """A secure sum that a peer still has secrets of: a turn of a run's round."""

    run: Id
    round: Count
    turn: Count
    kind: Literal["train", "evaluate"]


class PollRequest(Struct, frozen=True, kw_only=True):
    """An agent's request: the reply to its last work, if any, and whether it can take new work.

    `update`: the bytes of a small update; a large one is uploaded before. `owner_has_decided`: the
    owner has allowed or forbidden a task since the agent refused work without consent.
    `steps_only`: it is paused, and takes only the steps of a secure sum that it takes part in.
    `seen`: what it has seen of the log of versions (`p2p.seen_heads`), to get the news of it; None
    if not now. `charged`: a signed `ChargedHead`, if it has changed. `open_sum`: a sum that it has
    not taken the last step of. `run`: the run that it works for; the answer says if that has ended.
    """

    reply: FlowerMessage | None = None
    wants_work: bool = field(default=True, name="want")
    update: Annotated[bytes, Meta(max_length=INLINE_MAX_BYTES)] = b""
    owner_has_decided: bool = field(default=False, name="decided")
    steps_only: bool = field(default=False, name="steps")
    seen: SeenBytes | None = None
    charged: _ChargedBytes = b""
    open_sum: OpenSum | None = field(default=None, name="sum")
    run: MaybeId = ""


class PollResponse(Struct, frozen=True, kw_only=True):
    """The coordinator's answer: work, if there is any.

    `acknowledged`: the reply is handled and that is in the ledger, so it survives a crash of the
    coordinator. False if no run waits for the reply, or if it is not handled yet; the coordinator
    may then ask again. `version`: the bytes of a small version to work on, if it is new. `log`:
    the news of the log of versions, for a request with `seen`. `notices`: lines for the owner: why
    a run does not use this machine. `charged`: the agent's own statement with more charges than it
    states now. `sum_is_over`: no step of the `open_sum` will be asked for. `run_is_over`: the `run`
    of the request has ended. `offers`: the number of
    the newest list of offered tasks (`messages.offers`); 0 without any.
    """

    work: FlowerMessage | None = None
    acknowledged: bool = field(default=False, name="settled")
    version: Annotated[bytes, Meta(max_length=INLINE_MAX_BYTES)] = b""
    log: LogNews | None = None
    notices: Annotated[tuple[Text, ...], Meta(max_length=MAX_NOTICES)] = ()
    charged: _ChargedBytes = b""
    sum_is_over: bool = field(default=False, name="over")
    run_is_over: bool = field(default=False, name="ended")
    offers: Count = 0


SIGNED_WORK = SignedJson(Work, "work", "piece of work")
SIGNED_CHARGED = SignedJson(
    ChargedHead, "charged head", "statement about charges", "the peer that it names"
)
SIGNED_CLAIM = SignedJson(UpdateClaim, "claim", "claim", "the peer that sent it")
