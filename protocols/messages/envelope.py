"""Messages on MQTT: presence, telemetry, commands and events, each in a signed envelope. Pure.

A payload is `base64url(signature) + b"." + JSON of an Envelope`. The Ed25519 signature covers the
topic and the JSON bytes as sent, so no canonical form is needed. Strings with control characters
are refused, because a terminal would run the escape codes in them.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from protocols.errors import Awaited, BadMessage
from protocols.messages.states import PeerState, RunState

FORMAT = 1
MAX_PAYLOAD_BYTES = 16 * 1024

# Ends in \Z, because `$` also matches before a trailing newline.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]*\Z"
Text = Annotated[str, Meta(max_length=400, pattern=_PRINTABLE)]
Name = Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Digest = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]{64}\Z")]
MaybeDigest = Annotated[str, Meta(max_length=64, pattern=r"^([0-9a-f]{64})?\Z")]
#: Names a run, job, peer, session or request. It has no separator and no `..`, so that a check that
#: is forgotten later harms nothing. It still becomes a path only by `protocols.local.safe_paths`.
Id = Annotated[str, Meta(max_length=64, pattern=r"^(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]
MaybeId = Annotated[
    str, Meta(max_length=64, pattern=r"^((?!.*\.\.)[A-Za-z0-9][A-Za-z0-9_.-]{0,63})?\Z")
]
#: A task, such as `mnist` or `my_task.py:MyTask`; empty for work without one.
TaskName = Annotated[str, Meta(max_length=64, pattern=r"^([A-Za-z0-9][A-Za-z0-9_.:-]*)?\Z")]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
#: Unix s, which stays a date after a correction of clocks.
Time = Annotated[float, Meta(ge=-(2**40), le=2**40)]
#: The value of a setting. Agreed preprocessing is a long one.
Setting = Annotated[str, Meta(max_length=256 * 1024)] | Integer | float | bool
Settings = Annotated[dict[Name, Setting], Meta(max_length=256)]
Labels = Annotated[dict[Name, Name], Meta(max_length=16)]
#: By peer: one entry for each peer of the largest fleet.
MAX_PEERS = 65_536
#: Peers from which one fetches a version.
MAX_SOURCES = 16
#: Counts by name that are summed over peers: see `protocols.tables.evaluation_counts`.
Tallies = Annotated[dict[Name, Annotated[list[float], Meta(max_length=1024)]], Meta(max_length=8)]
#: JSON has no NaN or infinity: they are sent as null and arrive as None.
Metrics = Annotated[dict[Name, float | None], Meta(max_length=256)]


def strip_controls(text: str) -> str:
    """`text` as a `Text`: at most 400 characters, each control character replaced by `·`."""
    text = text[:400]
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "·" for letter in text)


class Presence(Struct, frozen=True, tag=True, kw_only=True):
    """The state of a peer; retained by the broker. `tasks` are those that it can and may run,
    `askable` those for which its owner would be asked.

    `policy`: the settings that its owner shows to others; `paused_by`: the rules of the policy that
    pause it. `disk_free_bytes`: 0 if unknown.
    A paused peer expects to work again at `free_at`; another one can work until `free_until` (Unix
    s, 0 if unknown). `will` marks the copy that the broker sends when the connection is lost.
    """

    state: PeerState
    reason: Text = ""
    name: Name = ""
    version: Name = ""
    task: TaskName = ""
    run: MaybeId = ""
    round: Count = 0
    tasks: Annotated[tuple[TaskName, ...], Meta(max_length=64)] = ()
    askable: Annotated[tuple[TaskName, ...], Meta(max_length=64)] = ()
    policy: Annotated[dict[Name, Name], Meta(max_length=32)] = {}
    paused_by: Annotated[tuple[Name, ...], Meta(max_length=16)] = ()
    disk_free_bytes: Count = 0
    free_at: Annotated[float, Meta(ge=0, le=2**40)] = 0.0
    free_until: Annotated[float, Meta(ge=0, le=2**40)] = 0.0
    will: bool = False


class Telemetry(Struct, frozen=True, tag=True, kw_only=True):
    """Measurements of a peer while it works. Bytes are counted since the agent started."""

    run: MaybeId = ""
    round: Count = 0
    phase: Literal["", "train", "evaluate"] = ""
    step: Count = 0
    steps: Count = 0
    loss: float | None = None
    diverged: bool = False
    samples_per_s: float = 0.0
    bytes_up: Count = 0
    bytes_down: Count = 0
    cpu_percent: float = 0.0
    memory_bytes: Count = 0
    battery_percent: float | None = None


class Notice(Struct, frozen=True, tag=True, kw_only=True):
    """A line for the operator from an agent."""

    level: Literal["info", "warning", "error"]
    text: Text


class Doorbell(Struct, frozen=True, tag=True):
    """Work is waiting. The agent then polls the coordinator; the message itself has no content."""


class Command(Struct, frozen=True, tag=True, kw_only=True):
    """A command of the operator to an agent. `for_s` = 0 means until further notice."""

    action: Literal["pause", "resume", "finish"]
    for_s: Annotated[float, Meta(ge=0, le=366 * 86400)] = 0.0


class LogRequest(Struct, frozen=True, tag="LogsAsked", kw_only=True):
    """Asks an agent for the last `max_lines` lines of its log; the answer has the `request_id`."""

    request_id: Id = field(name="ask")
    max_lines: Annotated[int, Meta(ge=1, le=500)] = field(default=200, name="most")


class LogLine(Struct, frozen=True, kw_only=True):
    """A line of an agent's log without traceback, paths and secrets."""

    at: float
    level: Literal["debug", "info", "warning", "error"]
    text: Text


class LogResponse(Struct, frozen=True, kw_only=True):
    """The answer to `LogRequest`, sent over HTTPS so that nobody on the broker can read it."""

    request_id: Id = field(name="ask")
    lines: Annotated[list[LogLine], Meta(max_length=500)]


class PeerChanged(Struct, frozen=True, tag="PeerKnown", kw_only=True):
    """A peer was enrolled, approved or removed, or its session opened or ended.

    `public_key` is its Ed25519 key (raw, 32 bytes). `has_session`: whether it has a Flower session;
    None from older coordinators. `state`: what its requests show while its MQTT presence is
    missing, else None. `awaits_consent`: the task for which a run awaits its owner's consent;
    `awaits`: what of it; older coordinators await consent.
    `fetched_from`: the peers from which it fetched its last version, with bytes/s.
    """

    peer: Id
    name: Name
    labels: Labels = {}
    enrollment: Literal["awaiting", "enrolled", "removed"] = field(
        default="enrolled", name="standing"
    )
    public_key: PublicKey
    has_session: bool | None = field(default=None, name="flower")
    state: PeerState | None = None
    awaits_consent: TaskName = ""
    awaits: Awaited = "consent"
    fetched_from: Annotated[dict[Name, float], Meta(max_length=MAX_SOURCES)] = {}


class RunChanged(Struct, frozen=True, tag=True, kw_only=True):
    """The whole status of a run. `waiting_for` is text for a person.

    `num_refused` peers take no part in it now; `refused` has the reasons of the first ones.

    `memory_bytes`: memory for closing a round, for a strategy that needs all updates at once.
    `deleted`: the run is listed no longer. `choice`: the model that it has chosen, and why.
    `compared`: how many peers have told, after the end, what it brought them.
    """

    run: Id
    task: Name
    state: RunState
    round: Count
    rounds: Count
    quorum: Count
    asked: Count = 0
    answered: Count = 0
    waiting_for: Text = ""
    head: MaybeDigest = ""
    best_round: Count = 0
    ended_because: Text = ""
    num_refused: Count = 0
    refused: Annotated[dict[Name, Text], Meta(max_length=32)] = {}
    memory_bytes: Count = 0
    deleted: bool = False
    choice: Text = ""
    compared: Count = 0


class RoundClosed(Struct, frozen=True, tag=True, kw_only=True):
    """The result of a round. `loss` and `accuracy` come from federated evaluation.

    `norms`: of the updates, by peer. `spread`: by metric, the minimum, median and maximum over the
    peers; `worst`: by metric, the peer with the worst value. `spent`: seconds by phase of the round
    (`work`, `wait`, `transfer`, `aggregate`, `evaluate`). `digest`: empty for a round of a Flower
    app that has sent no arrays.
    """

    run: Id
    round: Count
    digest: MaybeDigest
    seconds: float
    peers: Count
    refused: Count = 0
    loss: float | None = None
    accuracy: float | None = None
    diverged: bool = False
    metrics: Metrics = {}
    bytes_up: Count = 0
    bytes_down: Count = 0
    norms: Annotated[dict[Name, float], Meta(max_length=MAX_PEERS)] = {}
    spread: Annotated[dict[Name, tuple[float, float, float]], Meta(max_length=256)] = {}
    worst: Annotated[dict[Name, Name], Meta(max_length=256)] = {}
    spent: Annotated[dict[Name, float], Meta(max_length=32)] = {}
    staleness: Annotated[dict[Name, Count], Meta(max_length=MAX_PEERS)] = {}


class JobChanged(Struct, frozen=True, tag=True, kw_only=True):
    """The complete state of an inference or analytics job.

    `done` of `total` counts rows of a scatter job, else peers. `peers` work on `leased` of the
    rest. `units` have a final answer, for `rows` rows, at `rows_per_s` by all peers together.
    `bytes_up` counts answers, `bytes_down` the rows that were sent out. `dropped` answers were not
    used; `num_excused` peers take no part, and `excused` has the reasons of the first ones.
    `began_at` and `ended_at` are Unix s by the coordinator's clock, 0 if unknown.
    """

    job: Id
    kind: Name
    task: Name = ""
    state: Name
    done: Count
    total: Count
    peers: Count = 0
    ended_because: Text = ""
    leased: Count = 0
    units: Count = 0
    rows: Count = 0
    rows_per_s: float = 0.0
    bytes_up: Count = 0
    bytes_down: Count = 0
    dropped: Count = 0
    num_excused: Count = 0
    excused: Annotated[dict[Name, Text], Meta(max_length=32)] = {}
    began_at: Annotated[float, Meta(ge=0, le=2**40)] = 0.0
    ended_at: Annotated[float, Meta(ge=0, le=2**40)] = 0.0


class EventLine(Struct, frozen=True, tag="Happened", kw_only=True):
    """A line for the Events page. `subject` is a peer or a run, or empty."""

    level: Literal["info", "warning", "error"]
    text: Text
    subject: Name = ""


class Links(Struct, frozen=True, tag=True, kw_only=True):
    """Whether the coordinator is connected to the broker and serves Flower.

    `rejected` counts malformed or forged MQTT messages. `why`: what is wrong with the link to the
    broker, or empty.
    """

    mqtt: bool
    flower: bool
    rejected: Count = 0
    why: Text = ""


PeerBody = Presence | Telemetry | Notice
#: Messages of the coordinator to one peer.
CommandBody = Doorbell | Command | LogRequest
#: Messages of the coordinator to the monitors.
EventBody = PeerChanged | RunChanged | RoundClosed | JobChanged | EventLine | Links
CoordinatorBody = CommandBody | EventBody
Body = PeerBody | CoordinatorBody


class Envelope(Struct, frozen=True, kw_only=True):
    """A message: its sender, session (`epoch`), number in the session (`seq`), time (Unix s)."""

    v: Count = FORMAT
    sender: Id
    epoch: Id
    seq: Count
    at: float
    body: Body


LOGS_PATH = "/cw/v1/logs"

_envelope = msgspec.json.Decoder(Envelope)
_encode = msgspec.json.Encoder().encode

Sign = Callable[[bytes], bytes]
Verify = Callable[[str, bytes, bytes], bool]


def _signed_bytes(topic: str, payload: bytes) -> bytes:
    return b"commonweight mqtt 1\n" + topic.encode() + b"\n" + payload


def seal(topic: str, envelope: Envelope, sign: Sign) -> bytes:
    """The payload of `envelope` on `topic`, signed by `sign`."""
    payload = _encode(envelope)
    return urlsafe_b64encode(sign(_signed_bytes(topic, payload))) + b"." + payload


def unseal(topic: str, payload: bytes, verify: Verify) -> Envelope:
    """The envelope in `payload`, if `verify(sender, signature, signed bytes)` returns True.

    Raises BadMessage: too long, malformed, another format, wrong types, wrong signature.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise BadMessage(f"a payload of {len(payload)} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    encoded, dot, body = payload.partition(b".")
    if not dot or len(encoded) != 88:
        raise BadMessage("the payload does not start with a signature")
    try:
        signature = urlsafe_b64decode(encoded)
        envelope = _envelope.decode(body)
    except (binascii.Error, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not a valid message: {err}") from err
    if (
        urlsafe_b64encode(signature) != encoded
    ):  # the decoder skips characters that it does not know
        raise BadMessage("the signature is not in canonical base64")
    if envelope.v != FORMAT:
        raise BadMessage(f"message format {envelope.v}; this version reads format {FORMAT}")
    if not verify(envelope.sender, signature, _signed_bytes(topic, body)):
        raise BadMessage(f"the signature is not that of {envelope.sender}")
    return envelope
