"""What is said beside weights and work: frozen, versioned, signed. Pure.

On MQTT a payload is `base64url(signature) + b"." + JSON of an Envelope`; the Ed25519 signature
covers the topic and the JSON bytes as sent, so nothing has to be put into a canonical form.
Strings that a person will see are refused when they hold control characters: no terminal
escape code passes this door.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from protocols.errors import BadMessage
from protocols.messages.states import PeerState, RunState

FORMAT = 1
MAX_PAYLOAD_BYTES = 16 * 1024

# Ends in \Z: to `$` a line end after the last character is as good as the end.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]*\Z"
Text = Annotated[str, Meta(max_length=400, pattern=_PRINTABLE)]
Name = Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
#: Lists of numbers by name that add up over peers: `protocols.tables.evaluation_counts`.
Tallies = Annotated[dict[Name, Annotated[list[float], Meta(max_length=1024)]], Meta(max_length=8)]
#: A NaN or an infinity has no JSON form: it travels as null and arrives as None.
Metrics = dict[Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)], float | None]


def strip_controls(text: str) -> str:
    """`text` as a `Text`: cut to its length, `·` for whatever could steer a terminal."""
    return "".join(letter if letter.isprintable() else "·" for letter in text[:400])


class Presence(Struct, frozen=True, tag=True, kw_only=True):
    """What a peer says of itself; retained. `tasks` are those it can and may run.

    `policy` is what its owner lets others know of the settings; `disk_free_bytes` 0 is unknown.
    A paused peer expects to be free again at `free_at`; another can work until `free_until`. Both
    Unix s, 0 for unknown. `will` marks the copy that the broker sends on a lost link.
    """

    state: PeerState
    reason: Text = ""
    name: Name = ""
    version: Name = ""
    task: Name = ""
    run: Name = ""
    round: Count = 0
    tasks: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    policy: Annotated[dict[Name, Name], Meta(max_length=32)] = {}
    disk_free_bytes: Count = 0
    free_at: Annotated[float, Meta(ge=0, le=2**40)] = 0.0
    free_until: Annotated[float, Meta(ge=0, le=2**40)] = 0.0
    will: bool = False


class Telemetry(Struct, frozen=True, tag=True, kw_only=True):
    """What a peer measures while it works. Bytes count since the agent started."""

    run: Name = ""
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
    """A line that a person should see."""

    level: Literal["info", "warning", "error"]
    text: Text


class Doorbell(Struct, frozen=True, tag=True):
    """Work is waiting. Carries nothing to trust: the agent asks the coordinator."""


class Command(Struct, frozen=True, tag=True, kw_only=True):
    """What the operator wants an agent to do. `for_s` = 0 means until further notice."""

    action: Literal["pause", "resume", "finish"]
    for_s: Annotated[float, Meta(ge=0, le=366 * 86400)] = 0.0


class LogRequest(Struct, frozen=True, tag="LogsAsked", kw_only=True):
    """The operator wants the last `most` lines of an agent's log; the answer names `ask`."""

    request_id: Name = field(name="ask")
    max_lines: Annotated[int, Meta(ge=1, le=500)] = field(default=200, name="most")


class LogLine(Struct, frozen=True, kw_only=True):
    """A line of an agent's log as others may see it: no trace, no path, nothing secret."""

    at: float
    level: Literal["debug", "info", "warning", "error"]
    text: Text


class LogResponse(Struct, frozen=True, kw_only=True):
    """The answer to `LogRequest`, sent over HTTPS so that nobody on the broker can read it."""

    request_id: Name = field(name="ask")
    lines: Annotated[list[LogLine], Meta(max_length=500)]


class PeerChanged(Struct, frozen=True, tag="PeerKnown", kw_only=True):
    """A peer was enrolled, approved or removed, or its session opened or ended.

    `public_key` is its Ed25519 key (raw, 32 bytes); `flower` says whether it holds a Flower
    session, None in the words of a coordinator that does not tell.
    """

    peer: Name
    name: Name
    labels: dict[Name, Name] = {}
    enrollment: Literal["awaiting", "enrolled", "removed"] = field(
        default="enrolled", name="standing"
    )
    public_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    has_session: bool | None = field(default=None, name="flower")


class RunChanged(Struct, frozen=True, tag=True, kw_only=True):
    """The whole status of a run. `waiting_for` is text for a person.

    `memory_bytes`: memory for closing a round, for a strategy that needs all updates at once.
    `deleted`: the run is listed no longer.
    """

    run: Name
    task: Name
    state: RunState
    round: Count
    rounds: Count
    quorum: Count
    asked: Count = 0
    answered: Count = 0
    waiting_for: Text = ""
    head: Name = ""
    best_round: Count = 0
    ended_because: Text = ""
    memory_bytes: Count = 0
    deleted: bool = False


class RoundClosed(Struct, frozen=True, tag=True, kw_only=True):
    """One round's outcome. `loss` and `accuracy` are federated evaluation; `norms` are by peer.

    `spread`: by metric the least, the median and the most that a peer told; `worst`: the peer that
    is served worst. `spent`: seconds by part of the round (`work`, `wait`, `transfer`, `aggregate`,
    `evaluate`).
    """

    run: Name
    round: Count
    digest: Digest
    seconds: float
    peers: Count
    refused: Count = 0
    loss: float | None = None
    accuracy: float | None = None
    diverged: bool = False
    metrics: Metrics = {}
    bytes_up: Count = 0
    bytes_down: Count = 0
    norms: dict[Name, float] = {}
    spread: dict[Name, tuple[float, float, float]] = {}
    worst: dict[Name, Name] = {}
    spent: dict[Name, float] = {}
    staleness: dict[Name, Count] = {}


class JobChanged(Struct, frozen=True, tag=True, kw_only=True):
    """Where a job beside training stands, said whole each time.

    `done` of `total`: rows that were spread, or peers that were asked; of what is left, `peers`
    have `leased` in hand. `units` are answered for good. `rows` were answered for, `rows_per_s` by
    all who answered together. Bytes are those of answers (`bytes_up`) and of spread rows
    (`bytes_down`). `dropped` answers did not count; `num_excused` peers take no part, `excused`
    says why (of the first of them).
    `began_at` and `ended_at` are Unix s by the coordinator's clock, 0 where that is not known.
    """

    job: Name
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


class EventLine(Struct, frozen=True, tag="EventLine", kw_only=True):
    """A line for the Events screen. `subject` is a peer or a run, or empty."""

    level: Literal["info", "warning", "error"]
    text: Text
    subject: Name = ""


class Links(Struct, frozen=True, tag=True, kw_only=True):
    """The coordinator's own links: is the broker there, how many agents hold a Flower session."""

    mqtt: bool
    flower: bool
    rejected: Count = 0


PeerBody = Presence | Telemetry | Notice
CoordinatorBody = (
    Doorbell
    | Command
    | LogRequest
    | PeerChanged
    | RunChanged
    | RoundClosed
    | JobChanged
    | EventLine
    | Links
)
Body = PeerBody | CoordinatorBody


class Envelope(Struct, frozen=True, kw_only=True):
    """One message: its sender, the session (`epoch`), its number in it (`seq`), Unix s (`at`)."""

    v: int = FORMAT
    sender: Name
    epoch: Name
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
    """The envelope in `payload`, after `verify(sender, signature, signed bytes)` said yes.

    Raises BadMessage: too long, not ours, another format, wrong types, bad signature.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise BadMessage(f"a payload of {len(payload)} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    encoded, dot, body = payload.partition(b".")
    if not dot or len(encoded) != 88:
        raise BadMessage("no signature before the message")
    try:
        signature = urlsafe_b64decode(encoded)
        envelope = _envelope.decode(body)
    except (binascii.Error, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not one of our messages: {err}") from err
    if urlsafe_b64encode(signature) != encoded:  # the decoder passes over what it does not know
        raise BadMessage("the signature is not written in the one way that there is")
    if envelope.v != FORMAT:
        raise BadMessage(f"message format {envelope.v}; this version speaks {FORMAT}")
    if not verify(envelope.sender, signature, _signed_bytes(topic, body)):
        raise BadMessage(f"the signature is not that of {envelope.sender}")
    return envelope
