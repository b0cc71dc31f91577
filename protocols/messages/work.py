"""What a round asks and gets: signed work, signed claims, and the exchange that carries them. Pure.

Work and claims travel in Flower's messages, these in our exchanges.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from protocols.messages.envelope import Count, Digest, Metrics, Name, Tallies
from protocols.messages.signing import SignedJson

POLL_PATH = "/cw/v1/exchange"
#: Weights of this size travel with the messages: a request on the lane costs more than they do.
INLINE_MAX_BYTES = 64 * 1024

WorkKind = Literal["describe", "init", "train", "evaluate", "holdings", "recall"]


class Work(Struct, frozen=True, kw_only=True):
    """What the coordinator asks of an agent, and signs.

    To describe its data, make first weights, train or evaluate. `base` names the version to work on
    and `nbytes` its size; for "init" both are empty, and for "describe" `base` is the digest of the
    preprocessing that was agreed on, if it was. `codec` is the one to send the update with. A patch
    of `patch_bytes` (0: none) leads from the version `parent` to `base`. `card` is what the peers
    have alike, a `schemas.SchemaCard` as JSON; empty while that is not known. `turn`: how many
    times this peer has trained this version before. `since` is when the run was started (Unix s).
    """

    run: Name
    since: float = 0.0
    round: Count
    kind: WorkKind
    task: Name
    base: Name = ""
    nbytes: Count = 0
    parent: Name = ""
    patch_bytes: Count = 0
    codec: Name = "fp32"
    turn: Count = 0
    seed: int = 0
    settings: dict[Name, str | int | float | bool] = {}
    card: str = ""
    deadline_s: float = 0.0


class UpdateClaim(Struct, frozen=True, kw_only=True):
    """What an agent says of its update, and signs; `turn` is that of the work.

    `base` is the version it trained on; `digest`, `nbytes` are those of the file as it was sent, or
    of the description.
    """

    run: Name
    round: Count
    kind: WorkKind
    turn: Count = 0
    peer: Name
    base: Name
    digest: Name
    nbytes: Count
    codec: Name = "fp32"
    num_examples: int
    metrics: Metrics = {}
    tallies: Tallies = {}
    nonce: Name


class FlowerMessage(Struct, frozen=True, kw_only=True):
    """A Flower message with everything it needs: its protobuf, its object tree, its objects."""

    message: bytes
    tree: bytes
    objects: dict[Digest, bytes]


class PollRequest(Struct, frozen=True, kw_only=True):
    """An agent's request: a reply to hand in, if it has one, and whether it takes new work.

    `update`: the bytes that the reply's claim names, if they are few; else they are on the lane.
    """

    reply: FlowerMessage | None = None
    wants_work: bool = field(default=True, name="want")
    update: bytes = b""


class PollResponse(Struct, frozen=True, kw_only=True):
    """The coordinator's answer: work, if there is any.

    `settled`: what became of the reply is in the ledger and outlives the coordinator's death. False
    if nobody waits for the reply, or if that is not known yet: the question may come again.
    `version`: the bytes of the version that the work is on, if they are few and new.
    """

    work: FlowerMessage | None = None
    acknowledged: bool = field(default=False, name="settled")
    version: bytes = b""


SIGNED_WORK = SignedJson(Work, "work", "piece of work")
SIGNED_CLAIM = SignedJson(UpdateClaim, "claim", "claim", "the peer that sent it")
