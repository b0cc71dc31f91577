"""Signed messages of a Flower app's run, and the signed answers of peers. Pure.

The records of a Flower message travel as `Records`, in MessagePack, and its arrays as a file of
weights, by digest. No pickle and no code travels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.errors import BadMessage
from protocols.messages.decoding import decode
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
    Text,
)
from protocols.messages.signing import SignedJson

#: The action of the Flower message that carries the work, and the record in it. The action is that
#: of jobs: older agents refuse the work as no job. An action that they do not know would end them.
ACTION, RECORD = "infer", "cw.app"
#: Of the records of one message, without arrays. As base64 it fits into a Flower message.
MAX_RECORD_BYTES = 512 * 1024
MAX_RECORDS, MAX_KEYS, MAX_VALUES = 64, 65_536, 16_384
#: Metrics of one answer that are recorded, each a number.
MAX_METRICS = 32
_MAX_EXAMPLES = 10**12
#: By Flower's own names, which write it either way.
_EXAMPLES = ("num-examples", "num_examples")
#: Where the clients of legacy apps have their own metrics: in configs.
_LEGACY_METRICS = ("fitres.metrics", "evaluateres.metrics")
MessageType = Annotated[
    str,
    Meta(
        max_length=64,
        pattern=r"^((train|evaluate|query)(\.[A-Za-z_][A-Za-z0-9_]*)?|get_(properties|parameters))\Z",
    ),
]
RecordBytes = Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
_Key = Annotated[str, Meta(max_length=512)]


class Opaque(Struct, frozen=True, array_like=True):
    """An array that is not one of numpy's types that weights have: it travels as its bytes."""

    dtype: _Key
    shape: Annotated[tuple[Count, ...], Meta(max_length=32)]
    stype: _Key


class Arrays(Struct, frozen=True, tag="a", array_like=True):
    """An ArrayRecord: its keys, in order. The arrays are in the file."""

    name: _Key
    keys: Annotated[tuple[_Key, ...], Meta(max_length=MAX_KEYS)]
    opaque: Annotated[dict[_Key, Opaque], Meta(max_length=MAX_KEYS)] = {}


class Blob(Struct, frozen=True, tag="b"):
    """Bytes as a value of a record."""

    data: RecordBytes


_Scalar = bool | Integer | float | Annotated[str, Meta(max_length=MAX_RECORD_BYTES)] | Blob
_Value = _Scalar | Annotated[list[_Scalar], Meta(max_length=MAX_VALUES)]


class Values(Struct, frozen=True, tag="v", array_like=True):
    """A MetricRecord, or else a ConfigRecord. Flower checks the types of its values."""

    name: _Key
    is_metrics: bool
    values: Annotated[dict[_Key, _Value], Meta(max_length=MAX_VALUES)]


Records = Annotated[tuple[Arrays | Values, ...], Meta(max_length=MAX_RECORDS)]


class AppWork(Struct, frozen=True, kw_only=True):
    """A message for a ClientApp, signed by the coordinator; or `check`: can this peer do such work?

    `number`: of the message in its run. `code`: the digest of the app's code. `config`: changes of
    its run config. `base`: the file of the arrays, of `nbytes`; empty without any. `flower_run`,
    `node`: the ids that the app sees. `round`: for people.
    """

    run: Id
    number: Count
    kind: Literal["check", "message"]
    app: Name
    code: Digest
    config: Settings = {}
    message_type: MessageType = "query"
    group: Text = ""
    told: RecordBytes = b""
    base: MaybeDigest = ""
    nbytes: Count = 0
    flower_run: Count = 0
    node: Count = 0
    round: Count = 0
    deadline_s: Annotated[float, Meta(gt=0, le=2**40)] = 600.0
    fleet: MaybeId = ""


class AppAnswer(Struct, frozen=True, kw_only=True):
    """The answer to the work whose signed bytes have the digest `key`, signed by the peer.

    `digest` and `nbytes` are those of the uploaded file; empty without arrays.
    """

    run: Id
    number: Count
    key: Digest
    peer: Id
    told: RecordBytes = b""
    digest: MaybeDigest = ""
    nbytes: Count = 0
    nonce: Id
    fleet: MaybeId = ""


SIGNED_APP_WORK = SignedJson(AppWork, "app work", "message for an app")
SIGNED_APP_ANSWER = SignedJson(AppAnswer, "app answer", "answer of an app", "the peer that sent it")
encode_told = msgspec.msgpack.Encoder().encode
_told = msgspec.msgpack.Decoder(Records)


def decode_records(data: bytes) -> tuple[Arrays | Values, ...]:
    """The records of a message. Raises BadMessage."""
    if len(data) > MAX_RECORD_BYTES:
        raise BadMessage(f"the records of a message have {len(data)} bytes")
    told: tuple[Arrays | Values, ...] = decode(_told, data, "list of records") if data else ()
    if len({record.name for record in told}) != len(told):
        raise BadMessage("two records of a message have one name")
    for record in told:
        if isinstance(record, Arrays) and len(set(record.keys)) != len(record.keys):
            raise BadMessage("a record of arrays has a key twice")
    return told


def has_arrays(told: tuple[Arrays | Values, ...]) -> bool:
    """True if a file of arrays belongs to these records."""
    return any(isinstance(record, Arrays) and record.keys for record in told)


def tensor_name(told: tuple[Arrays | Values, ...], record: Arrays, key: str) -> str:
    """The name of an array in the file: its key, if only one record of the message has arrays."""
    arrays = [one for one in told if isinstance(one, Arrays)]
    return key if len(arrays) == 1 else f"{arrays.index(record)}/{key}"


def metrics_of(told: tuple[Arrays | Values, ...]) -> tuple[int, Metrics]:
    """The number of examples (1 if the app says none) and the metrics that are plain numbers."""
    numbers: Metrics = {}
    examples = 1
    for record in told:
        if not isinstance(record, Values) or not (
            record.is_metrics or record.name in _LEGACY_METRICS
        ):
            continue
        for key, value in record.values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if key in _EXAMPLES:
                if 0 < value <= _MAX_EXAMPLES:
                    examples = int(value)
            elif len(key) <= 64 and key.isprintable() and math.isfinite(value):
                numbers[key] = float(value)
    return max(1, examples), dict(list(numbers.items())[:MAX_METRICS])


def round_mark(told: tuple[Arrays | Values, ...], group: str) -> str:
    """The mark that the messages of one round share, if the app sets one."""
    for record in told:
        if isinstance(record, Values) and not record.is_metrics and "server-round" in record.values:
            return str(record.values["server-round"])[:64]
    return group
