"""What jobs ask of peers beside training: signed units of work, and signed answers to them. Pure.

A unit asks one `Question`. Its `key` is the digest of its signed bytes, which hold job, unit,
models and question: the same unit asked again is the same work, and its answer serves again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Digest, Metrics, Name
from protocols.messages.signing import SignedJson

#: What a Flower message of type `query` is for. Flower has no types of our own.
QueryAction = Literal["infer", "analyze"]
#: An answer up to this size travels in the message, a longer one on the lane.
INLINE_MAX_BYTES = 64 * 1024
INPUT_PATH = "/cw/v1/inputs/{digest}"
ANSWER_PATH = "/cw/v1/answers/{digest}"

Setting = str | int | float | bool


class ModelRef(Struct, frozen=True):
    """A version of shared weights, pinned by its digest."""

    digest: Digest
    nbytes: Count


class Scatter(Struct, frozen=True, tag=True, kw_only=True):
    """Answer for rows of the requester's.

    They are in blocks, each a file of its own that ends in `suffix` and holds `rows[i]` rows; block
    after block, of `sizes[i]` bytes, they are the bytes of the digest `input`. The answer is lines
    of JSON: an array of column names, then an array for each row, in order.
    """

    input: Digest
    sizes: tuple[Count, ...]
    rows: tuple[Count, ...]
    suffix: Name


class Private(Struct, frozen=True, tag=True, kw_only=True):
    """Measure the models on rows of the peer's own. The answer is `Scores` as JSON.

    No metric over fewer than `min_group` rows leaves the peer.
    """

    min_group: Count


class Analyze(Struct, frozen=True, tag=True):
    """Answer a declarative query over rows of the peer's own, with statistics that merge."""

    query: str


UnitQuestion = Scatter | Private | Analyze


def query_action(question: UnitQuestion) -> QueryAction:
    """How the Flower message that carries this question is called."""
    return "analyze" if isinstance(question, Analyze) else "infer"


class Score(Struct, frozen=True):
    """A model on one peer's rows."""

    num_examples: Count
    metrics: Metrics


#: By the model's digest.
Scores = dict[Digest, Score]


class Unit(Struct, frozen=True, kw_only=True):
    """What the coordinator asks, and signs. `settings` are the task's."""

    job: Name
    unit: Count
    question: UnitQuestion
    task: Name = ""
    settings: dict[Name, Setting] = {}
    models: tuple[ModelRef, ...] = ()


class Answer(Struct, frozen=True, kw_only=True):
    """What a peer answers, and signs: the digest of the answer's bytes, and of how many rows."""

    key: Digest
    peer: Name
    digest: Digest
    nbytes: Count
    rows: Count
    nonce: Name


_scores = msgspec.json.Decoder(Scores)
encode = msgspec.json.Encoder().encode

SIGNED_UNIT = SignedJson(Unit, "unit", "unit of work")
SIGNED_ANSWER = SignedJson(Answer, "answer", "answer", "the peer that sent it")


def idempotency_key(payload: bytes) -> str:
    """The idempotency key of a unit, from its bytes."""
    return hashlib.sha256(payload).hexdigest()


def read_unit(payload: bytes, signature: bytes, verify: Callable[[bytes, bytes], bool]) -> Unit:
    """The unit in `payload` if `verify(signature, signed bytes)` says yes. Raises BadMessage."""
    unit = SIGNED_UNIT.open(payload, signature, verify)
    if isinstance(unit.question, Scatter) and len(unit.question.sizes) != len(unit.question.rows):
        raise BadMessage("a unit whose blocks are not all described")
    return unit


def decode_scores(payload: bytes) -> Scores:
    """The scores in `payload`. Raises BadMessage."""
    try:
        return _scores.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"no scores: {err}") from err
