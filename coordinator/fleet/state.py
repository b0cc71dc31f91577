"""The state of a fleet: peers, runs, rounds and events; and its JSON form. Pure."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from protocols.errors import Awaited
from protocols.messages import decoding
from protocols.messages.envelope import (
    MAX_PEERS,
    Count,
    Integer,
    JobChanged,
    Labels,
    Links,
    Name,
    RoundClosed,
    RunChanged,
    Telemetry,
    Text,
    Time,
)
from protocols.messages.states import PeerState

#: As in recordings of older versions, which have any text.
_Line = Annotated[str, Meta(max_length=4096)]
_Epochs = Annotated[list[Name], Meta(max_length=64)]
Level = Literal["info", "warning", "error"]

#: The reason of a peer that has not been seen since the coordinator's start.
NOT_SEEN = "not seen yet"


class Event(Struct, kw_only=True, frozen=True):
    """A line of the Events screen. `at` is Unix s by the reader's clock."""

    at: Time
    level: Level
    text: _Line
    subject: Name = ""


class Peer(Struct, kw_only=True):
    """A peer as the last messages describe it.

    `no_presence`: its MQTT presence is missing, and the coordinator derives `state` from its
    requests. `awaits_consent`: the task for which a run awaits its owner's consent;
    `awaits`: what of it.
    `paused_by`: the rules of its policy that pause it. `seen_at` is Unix s, 0 for never.
    `missed` counts lost messages. `said_at` is the newest date of its messages by its own
    clock, at most our time then. `skew_s` is how far its clock was ahead of ours at its
    last live message. `losses` are those of its training in the run `losses_run`, None where
    one is not finite. `fetched_from`: the peers from which it fetched its last version, with
    bytes/s. `contributions` has one character for each of the last rounds of the run
    `contributions_run`, newest last: `1` if its update is in the round's version, `0` if not, `?`
    if unknown. `flower` says whether it has a Flower session, None for unknown.
    """

    peer: Name
    name: Name
    labels: Labels = {}
    standing: Literal["awaiting", "enrolled"] = "enrolled"
    public_key: Annotated[bytes, Meta(max_length=32)]
    flower: bool | None = None
    no_presence: bool = False
    state: PeerState = PeerState.OFFLINE
    reason: Text = NOT_SEEN
    awaits_consent: Name = ""
    awaits: Awaited = "consent"
    version: Name = ""
    task: Name = ""
    run: Name = ""
    round: Count = 0
    telemetry: Telemetry | None = None
    losses: Annotated[list[float | None], Meta(max_length=1024)] = []
    losses_run: Name = ""
    diverged: bool = False
    fetched_from: Annotated[dict[Name, float], Meta(max_length=64)] = {}
    contributions: Annotated[str, Meta(max_length=1024)] = field(default="", name="given")
    contributions_run: Name = field(default="", name="given_run")
    tasks: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    policy: Annotated[dict[Name, Name], Meta(max_length=32)] = {}
    paused_by: Annotated[tuple[Name, ...], Meta(max_length=16)] = ()
    disk_free_bytes: Count = 0
    free_at: Time = 0.0
    free_until: Time = 0.0
    skew_s: float = 0.0
    seen_at: Time = 0.0
    said_at: Time = 0.0
    epoch: Name = ""
    past_epochs: _Epochs = []
    seq: Integer = -1
    presence_seq: Integer = -1
    telemetry_seq: Integer = -1
    notice_seq: Integer = -1
    will_seq: Integer = -1
    missed: Integer = 0
    ignored: Integer = 0


class Run(Struct, kw_only=True):
    """A run's last status and its rounds in order. Only the last round has `norms`."""

    changed: RunChanged
    changed_at: Time
    rounds: Annotated[list[RoundClosed], Meta(max_length=4096)] = []


class Job(Struct, kw_only=True):
    """A job beside training. Its times are Unix s by the reader's clock, or 0."""

    changed: JobChanged
    changed_at: Time
    began_at: Time = 0.0
    ended_at: Time = 0.0


class Fleet(Struct, kw_only=True):
    """Everything that the monitor, `status` and the metrics show. `at`: the time of encoding."""

    fleet: _Line
    name: _Line = ""
    at: Time = 0.0
    peers: Annotated[dict[Name, Peer], Meta(max_length=MAX_PEERS)] = {}
    runs: Annotated[dict[Name, Run], Meta(max_length=256)] = {}
    jobs: Annotated[dict[Name, Job], Meta(max_length=256)] = {}
    events: Annotated[list[Event], Meta(max_length=4096)] = []
    num_events: Integer = 0
    links: Links = Links(mqtt=False, flower=False)
    epoch: Name = ""
    past_epochs: _Epochs = []
    seq: Integer = -1
    gap: bool = False


def finite(value: float | None) -> float | None:
    """`value`, or None if it is NaN, infinite or too large for a float."""
    try:
        return value if value is not None and math.isfinite(value) else None
    except OverflowError:
        return None


_decoder = msgspec.json.Decoder(Fleet)


def encode(fleet: Fleet, now: float) -> bytes:
    """The fleet as JSON, with the time of this machine."""
    fleet.at = now
    return msgspec.json.encode(fleet)


def decode(data: bytes) -> Fleet:
    """The fleet in `data`. Raises BadMessage."""
    hint = "The coordinator and this program may be of different versions."
    return decoding.decode(_decoder, data, "snapshot of a fleet", hint)


def rebase_times(fleet: Fleet, now: float) -> Fleet:
    """Move the fleet's times to this machine's clock, in place, because clocks differ."""
    ahead = now - fleet.at
    fleet.at = now
    for peer in fleet.peers.values():
        peer.seen_at = peer.seen_at + ahead if peer.seen_at else 0.0
    for run in fleet.runs.values():
        run.changed_at += ahead
    for job in fleet.jobs.values():
        job.changed_at += ahead
        job.began_at += ahead if job.began_at else 0.0
        job.ended_at += ahead if job.ended_at else 0.0
    fleet.events = [msgspec.structs.replace(event, at=event.at + ahead) for event in fleet.events]
    return fleet
