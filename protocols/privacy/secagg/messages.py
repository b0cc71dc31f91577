"""The structs of secure aggregation on the wire: cards, and the steps ready to unmask. Pure.

    step     coordinator -> peer          peer -> coordinator
    ready    ReadyRequest                 SignedCard
    share    ShareRequest                 ShareAnswer
    mask     MaskRequest                  MaskAnswer, and the masked update as an upload
    agree    AgreeRequest                 AgreeAnswer
    unmask   UnmaskRequest                UnmaskAnswer

The transport identifies the sender: a request comes from the coordinator, and an answer from the
peer that signed the claim around it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.messages.envelope import Count, Digest, Id, PublicKey
from protocols.messages.signing import SignedJson

#: The most peers of a cohort, so that the cards of all fit into a message of 1 MiB.
MAX_COHORT = 1024
MAX_CARD_BYTES, MAX_PLAN_BYTES = 1024, 256 * 1024
SEALED_BYTES = 33 + 33 + 16
MAX_WEIGHT, MAX_TENSORS, MAX_TAILS = 65_536, 8192, 4096

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Share = Annotated[bytes, Meta(min_length=33, max_length=33)]
Sealed = Annotated[bytes, Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
Peers = Annotated[tuple[Id, ...], Meta(max_length=MAX_COHORT)]
Limit = Annotated[float, Meta(gt=0, le=1e30)]


class Card(Struct, frozen=True, kw_only=True):
    """What a peer promises for one turn, signed by its node key. It serves one cohort.

    `public`: the key of the peer's id. `mask_key`, `channel_key`: X25519. `examples`: those that
    its update is a mean over. `commitment`: the hash of its self-mask seed.
    """

    fleet: Id
    run: Id
    round: Count
    turn: Count
    base: Digest
    peer: Id
    public: PublicKey
    examples: Count
    mask_key: Bytes32
    channel_key: Bytes32
    commitment: Bytes32
    nonce: Bytes32


class SignedCard(Struct, frozen=True, array_like=True):
    """A card as JSON, and the signature over it."""

    card: Annotated[bytes, Meta(max_length=MAX_CARD_BYTES)]
    signature: Signature


class Plan(Struct, frozen=True, kw_only=True):
    """What all peers of a cohort compute alike. It is part of the cohort's id.

    `ring`: bits. `sizes`, `limits`: elements and clipping limit of each tensor. `tails`: integers
    of 64 bits after the weights. `max_weight`, `max_examples`: see `ring.integer_weights`.
    """

    fleet: Id
    run: Id
    round: Count
    base: Digest
    ring: Literal[16, 32]
    sizes: Annotated[tuple[Count, ...], Meta(max_length=MAX_TENSORS)]
    limits: Annotated[tuple[Limit, ...], Meta(max_length=MAX_TENSORS)]
    tails: Annotated[int, Meta(ge=0, le=MAX_TAILS)] = 0
    max_weight: Annotated[int, Meta(ge=1, le=MAX_WEIGHT)] = 1
    max_examples: Count = 0


class ReadyRequest(Struct, frozen=True, kw_only=True):
    """Asks a peer for its card. `turn`: how often it has trained this version before."""

    fleet: Id
    run: Id
    round: Count
    turn: Count
    base: Digest


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
