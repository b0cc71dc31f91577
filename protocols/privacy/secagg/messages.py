"""The structs of secure aggregation on the wire: cards, and the steps ready to unmask. Pure.

    step     coordinator -> peer          peer -> coordinator
    ready    ReadyRequest                 ReadyAnswer
    share    ShareRequest                 ShareAnswer
    mask     MaskRequest                  MaskAnswer, and the masked update as an upload
    agree    AgreeRequest                 AgreeAnswer
    unmask   UnmaskRequest                UnmaskAnswer

The transport identifies the sender: a request comes from the coordinator, and an answer from the
peer that signed the claim around it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from protocols.errors import UsageError
from protocols.messages.decoding import decode
from protocols.messages.envelope import (
    Count,
    Digest,
    Id,
    MaybeDigest,
    Name,
    PublicKey,
    TaskName,
)
from protocols.messages.signing import SignedJson
from protocols.messages.work import SecureStep

T = TypeVar("T")
#: The most peers of a cohort, so that the cards of all fit into a message of 1 MiB.
MAX_COHORT = 1024
MAX_CARD_BYTES, MAX_PLAN_BYTES = 1024, 256 * 1024
SEALED_BYTES = 33 + 33 + 16
MAX_WEIGHT, MAX_TENSORS = 65_536, 8192
#: How `Work.codec` names the rings. Agents of older versions refuse these names.
_MASKED = {"fp32": "masked:32", "int8": "masked:16", "sums": "exact:32"}
_RINGS = {"masked:32": 32, "masked:16": 16, "exact:32": 32}

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Share = Annotated[bytes, Meta(min_length=33, max_length=33)]
Sealed = Annotated[bytes, Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
Peers = Annotated[tuple[Id, ...], Meta(max_length=MAX_COHORT)]
Limit = Annotated[float, Meta(ge=1e-30, le=1e30)]
#: What a sum is of: updates with the metrics of their training, metrics of an evaluation alone, or
#: answers to a question.
SumKind = Literal["train", "evaluate", "question"]


class TailNames(Struct, frozen=True, kw_only=True):
    """The metrics that are summed beside the update: see `secagg.tails`.

    `metrics`: names, sorted. `tallies`: how many numbers each tally has.
    """

    metrics: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()
    tallies: Annotated[dict[Name, Annotated[int, Meta(ge=1, le=1024)]], Meta(max_length=8)] = {}


class Card(Struct, frozen=True, kw_only=True):
    """A peer's promise for one turn, signed by its node key. It serves one cohort.

    `public`: the key of the peer's id. `mask_key`, `channel_key`: X25519. `examples`: those that
    its update is a mean over. `commitment`: the hash of its self-mask seed. `terms`: as in
    `ReadyRequest`.
    """

    fleet: Id
    run: Id
    round: Count
    turn: Count
    kind: SumKind = "train"
    base: Digest
    peer: Id
    public: PublicKey
    examples: Count
    mask_key: Bytes32
    channel_key: Bytes32
    commitment: Bytes32
    nonce: Bytes32
    terms: MaybeDigest = ""


class SignedCard(Struct, frozen=True, array_like=True):
    """A card as JSON, and the signature over it."""

    card: Annotated[bytes, Meta(max_length=MAX_CARD_BYTES)]
    signature: Signature


class Plan(Struct, frozen=True, kw_only=True):
    """The parameters that all peers of a cohort share. They are part of the cohort's id.

    `ring`: bits. `sizes`, `limits`: elements and clipping limit of each tensor; empty for an
    evaluation. `clip`: the maximum Euclidean norm of a peer's change. `names`: the metrics beside
    the weights. `max_weight`, `max_examples`: see `ring.integer_weights`. `divisor`: in a run with
    shared noise, a peer multiplies its change by its examples over this, and has the weight 1; 0 in
    other runs. Agents of older versions refuse such a run before: see `private_training.SHARED`.
    `exact`: updates are integers of one tensor, which are summed as they are, each with the weight
    1. Unset in other plans, whose bytes are those of older versions. Agents of these do not know
    the codec of such a run.
    """

    fleet: Id
    run: Id
    round: Count
    kind: SumKind = "train"
    base: Digest
    ring: Literal[16, 32]
    sizes: Annotated[tuple[Count, ...], Meta(max_length=MAX_TENSORS)]
    limits: Annotated[tuple[Limit, ...], Meta(max_length=MAX_TENSORS)]
    clip: Limit = 1e30
    names: TailNames = TailNames()
    max_weight: Annotated[int, Meta(ge=1, le=MAX_WEIGHT)] = 1
    max_examples: Count = 0
    divisor: Annotated[float, Meta(ge=0, le=1e18)] = 0.0
    exact: bool | UnsetType = UNSET


class ReadyRequest(Struct, frozen=True, kw_only=True):
    """The request for a peer's card. `turn`: how often this round was begun before.

    `task`, and `terms`: the digest of task, settings and seed. All cards of a cohort have the same
    terms; else a coordinator could have all peers but one train with a tiny learning rate.
    """

    fleet: Id
    run: Id
    round: Count
    turn: Count
    kind: SumKind = "train"
    base: Digest
    task: TaskName = ""
    terms: MaybeDigest = ""


class ReadyAnswer(Struct, frozen=True, kw_only=True):
    """The peer's card, and the metrics that it has for the sum."""

    card: SignedCard
    names: TailNames = TailNames()


class ShareRequest(Struct, frozen=True, kw_only=True):
    """The cohort: its plan (msgpack of `Plan`) and the cards of all its peers."""

    plan: Annotated[bytes, Meta(max_length=MAX_PLAN_BYTES)]
    cards: Annotated[tuple[SignedCard, ...], Meta(max_length=MAX_COHORT)]


class ShareAnswer(Struct, frozen=True, kw_only=True):
    """By neighbor: a share of the self-mask seed and one of the mask key, sealed for it."""

    cohort: Bytes32
    shares: Annotated[dict[Id, Sealed], Meta(max_length=MAX_COHORT)]


class MaskRequest(Struct, frozen=True, kw_only=True):
    """Who has shared, and what the neighbors among them sealed for this peer."""

    cohort: Bytes32
    sharers: Peers
    shares: Annotated[dict[Id, Sealed], Meta(max_length=MAX_COHORT)]


class MaskAnswer(Struct, frozen=True, kw_only=True):
    """The masked update is uploaded under this digest."""

    cohort: Bytes32
    digest: Digest
    nbytes: Count


class AgreeRequest(Struct, frozen=True, kw_only=True):
    """Whose masked update counts."""

    cohort: Bytes32
    survivors: Peers


class AgreeAnswer(Struct, frozen=True, kw_only=True):
    """The peer's signature over cohort, sharers and survivors."""

    cohort: Bytes32
    signature: Signature


class UnmaskRequest(Struct, frozen=True, kw_only=True):
    """By neighbor: its signature over the same survivors."""

    cohort: Bytes32
    signatures: Annotated[dict[Id, Signature], Meta(max_length=MAX_COHORT)]


class UnmaskAnswer(Struct, frozen=True, kw_only=True):
    """One share by neighbor: of a survivor's self-mask seed, or of a dropout's mask key."""

    cohort: Bytes32
    seeds: Annotated[dict[Id, Share], Meta(max_length=MAX_COHORT)]
    keys: Annotated[dict[Id, Share], Meta(max_length=MAX_COHORT)]


SIGNED_CARD = SignedJson(Card, "secagg card", "card", "the peer that it names")
encode = msgspec.msgpack.Encoder().encode
Request: TypeAlias = ShareRequest | MaskRequest | AgreeRequest | UnmaskRequest
Answer: TypeAlias = ShareAnswer | MaskAnswer | AgreeAnswer | UnmaskAnswer
_REQUESTS: dict[SecureStep, msgspec.msgpack.Decoder[Any]] = {
    "share": msgspec.msgpack.Decoder(ShareRequest),
    "mask": msgspec.msgpack.Decoder(MaskRequest),
    "agree": msgspec.msgpack.Decoder(AgreeRequest),
    "unmask": msgspec.msgpack.Decoder(UnmaskRequest),
}
_ANSWERS: dict[SecureStep, msgspec.msgpack.Decoder[Any]] = {
    "share": msgspec.msgpack.Decoder(ShareAnswer),
    "mask": msgspec.msgpack.Decoder(MaskAnswer),
    "agree": msgspec.msgpack.Decoder(AgreeAnswer),
    "unmask": msgspec.msgpack.Decoder(UnmaskAnswer),
}
#: The steps after ready, as kinds of work, in their order.
STEPS: tuple[SecureStep, ...] = get_args(SecureStep)
_READY = msgspec.msgpack.Decoder(ReadyAnswer)


def masked_codec(codec: str) -> str:
    """The text of `Work.codec` in a secure run with this codec. Raises UsageError."""
    if codec not in _MASKED:
        raise UsageError(
            f"secure aggregation sends integers, and cannot send the codec {codec}",
            "use --codec fp32 or --codec int8",
        )
    return _MASKED[codec]


def ring_of(codec: str) -> int:
    """The bits of the ring of a masked `Work.codec`; 0 for the codec of a run without masks."""
    return _RINGS.get(codec, 0)


def decode_request(step: SecureStep, data: bytes) -> Request:
    """The request of a step, with checked types and bounds. Raises BadMessage."""
    request: Request = decode(_REQUESTS[step], data, f"request of the step {step}")
    return request


def decode_answer(step: SecureStep, data: bytes) -> Answer:
    """The answer to a step, with checked types and bounds. Raises BadMessage."""
    answer: Answer = decode(_ANSWERS[step], data, f"answer to the step {step}")
    return answer


def decode_ready(data: bytes) -> ReadyAnswer:
    """A card, whose signature `cohort.open_card` checks, and names. Raises BadMessage."""
    return decode(_READY, data, "card")
