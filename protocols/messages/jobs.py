"""Signed units of inference and analytics jobs, and the signed answers of peers. Pure.

The idempotency key of a unit is the digest of its signed bytes: job, unit, models and question. A
unit that is sent again has the same key, so the peer can return its earlier answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.errors import BadMessage
from protocols.messages.decoding import decode
from protocols.messages.envelope import (
    Count,
    Digest,
    Id,
    MaybeId,
    Metrics,
    Settings,
    TaskName,
    Text,
)
from protocols.messages.signing import SignedJson

#: The action of a Flower message of type `query`; Flower allows no types of our own.
QueryAction = Literal["infer", "analyze"]
#: The steps of a secure question, in their order.
QuestionStep = Literal["shape", "ready", "share", "mask", "agree", "unmask"]
#: The longest request of such a step, which leaves room for the unit around it.
MAX_STEP_BYTES = 512 * 1024
#: An answer up to this size is sent in the message, a longer one as an upload.
INLINE_MAX_BYTES = 64 * 1024
INPUT_PATH = "/cw/v1/inputs/{digest}"
ANSWER_PATH = "/cw/v1/answers/{digest}"
#: Blocks of a unit, and models of a job.
_MAX_BLOCKS, _MAX_MODELS = 65_536, 64
_Counts = Annotated[tuple[Count, ...], Meta(max_length=_MAX_BLOCKS)]


class ModelRef(Struct, frozen=True):
    """A version of shared weights, by its digest."""

    digest: Digest
    nbytes: Count


class Scatter(Struct, frozen=True, tag=True, kw_only=True):
    """Predict for rows of the requester.

    The file with digest `input` is a sequence of blocks of `sizes[i]` bytes. Each block is a file
    of its own, with the name suffix `suffix` and `rows[i]` rows. The answer is lines of JSON: an
    array of column names, then one array per row, in order.
    """

    input: Digest
    sizes: _Counts
    rows: _Counts
    suffix: Annotated[str, Meta(max_length=9, pattern=r"^\.[a-z0-9]{1,8}\Z")]


class Private(Struct, frozen=True, tag=True, kw_only=True):
    """Evaluate the models on the peer's own rows. The answer is `Scores` as JSON.

    The peer returns no metric over fewer than `min_group` rows.
    """

    min_group: Count


class Analyze(Struct, frozen=True, tag=True, omit_defaults=True):
    """Answer a query over the peer's own rows, with statistics that can be merged.

    `method`: what the requester computes from several such questions, for the owner's list.
    """

    query: Annotated[str, Meta(max_length=256 * 1024)]
    method: Text = ""


class SecureAnalyze(Struct, frozen=True, tag=True, kw_only=True):
    """A step of a question of which the coordinator gets the sums over all peers alone.

    `session` names the sum. Step "shape" asks what the answer has, without its numbers; the other
    steps are those of `secagg.messages`, each with its encoded `request`.
    """

    query: Annotated[str, Meta(max_length=256 * 1024)]
    session: Id
    step: QuestionStep
    request: Annotated[bytes, Meta(max_length=MAX_STEP_BYTES)] = b""
    method: Text = ""


UnitQuestion = Scatter | Private | Analyze | SecureAnalyze


def query_action(question: UnitQuestion) -> QueryAction:
    """The action of the Flower message that carries this question."""
    return "analyze" if isinstance(question, Analyze | SecureAnalyze) else "infer"


class Score(Struct, frozen=True):
    """The metrics of a model on one peer's rows."""

    num_examples: Count
    metrics: Metrics


#: By the model's digest.
Scores = Annotated[dict[Digest, Score], Meta(max_length=_MAX_MODELS)]


class Unit(Struct, frozen=True, kw_only=True):
    """A unit of work, signed by the coordinator. `settings` are those of the task. `fleet`: the id
    of the fleet; empty from older coordinators.
    """

    job: Id
    unit: Count
    question: UnitQuestion
    task: TaskName = ""
    settings: Settings = {}
    models: Annotated[tuple[ModelRef, ...], Meta(max_length=_MAX_MODELS)] = ()
    fleet: MaybeId = ""


class Answer(Struct, frozen=True, kw_only=True):
    """The answer to the unit `key`, signed by the peer: digest, size and number of rows. `fleet`:
    the id of the fleet; empty from older agents.
    """

    key: Digest
    peer: Id
    digest: Digest
    nbytes: Count
    rows: Count
    nonce: Id
    fleet: MaybeId = ""


_scores = msgspec.json.Decoder(Scores)
encode = msgspec.json.Encoder().encode

SIGNED_UNIT = SignedJson(Unit, "unit", "unit of work")
SIGNED_ANSWER = SignedJson(Answer, "answer", "answer", "the peer that sent it")


def idempotency_key(payload: bytes) -> str:
    """The idempotency key of a unit, from its signed bytes."""
    return hashlib.sha256(payload).hexdigest()


def read_unit(payload: bytes, signature: bytes, verify: Callable[[bytes, bytes], bool]) -> Unit:
    """The unit in `payload`, if `verify(signature, signed bytes)` is True. Raises BadMessage."""
    unit = SIGNED_UNIT.open(payload, signature, verify)
    if isinstance(unit.question, Scatter) and len(unit.question.sizes) != len(unit.question.rows):
        raise BadMessage("the unit has not one size and one row count per block")
    return unit


def decode_scores(payload: bytes) -> Scores:
    """The scores in `payload`. Raises BadMessage."""
    return decode(_scores, payload, "list of scores")
