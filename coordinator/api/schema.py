"""Requests and responses of the routes for operators. Pure."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from msgspec import Meta, Struct

from coordinator.jobs.messages import JobShare
from coordinator.runs.state import Evaluation
from coordinator.storage.run_events import RunSpec
from protocols.enrollment.joining import Card
from protocols.errors import ExitCode
from protocols.messages.comparisons import Comparison
from protocols.messages.envelope import (
    MAX_PEERS,
    Count,
    Id,
    Integer,
    Labels,
    MaybeDigest,
    Name,
    PublicKey,
    Text,
)
from protocols.messages.mqtt import MqttAddress

#: The HTTP status of an error, by the exit code that a command has for it.
STATUS = {ExitCode.USAGE: 422, ExitCode.REFUSED: 403, ExitCode.UNREACHABLE: 503}


T = TypeVar("T")
#: Of a list that has a row for each run, job, ticket or member since the fleet began.
Rows = Annotated[list[T], Meta(max_length=1 << 20)]
#: The result of a request, by name: its id, or a ticket.
Made = Annotated[dict[Name, Annotated[str, Meta(max_length=16 * 1024)]], Meta(max_length=16)]


#: What each peer does in a job.
JobShares = Annotated[dict[Name, JobShare], Meta(max_length=MAX_PEERS)]


class ErrorResponse(Struct, frozen=True, kw_only=True):
    """An error of the coordinator. `hint`: the next step."""

    code: Annotated[str, Meta(max_length=256)]
    message: Annotated[str, Meta(max_length=64 * 1024)]
    hint: Annotated[str, Meta(max_length=64 * 1024)]


class StartRunRequest(Struct, frozen=True, kw_only=True):
    """Start a run. `from_digest` is a version that is already in the home."""

    spec: RunSpec
    from_digest: MaybeDigest = ""


class EvaluationsResponse(Struct, frozen=True, kw_only=True):
    """The last evaluation of each peer in a run, and what it told after the end.

    `withheld`: why there is no evaluation of single peers.
    """

    evaluations: Annotated[dict[Name, Evaluation], Meta(max_length=MAX_PEERS)] = {}
    comparisons: Annotated[dict[Name, Comparison], Meta(max_length=MAX_PEERS)] = {}
    withheld: Annotated[str, Meta(max_length=400)] = ""


class WatchResponse(Struct, frozen=True, kw_only=True):
    """What a monitor needs to follow the fleet over MQTT, with the fleet card that proves it."""

    fleet: Id
    coordinator_public: PublicKey
    mqtt: MqttAddress
    card: Card = b""


class TicketRequest(Struct, frozen=True, kw_only=True):
    """Create a ticket that is valid for `ttl_s` and for `uses` machines."""

    ttl_s: float = 86400.0
    uses: Count = 1
    label: Name = ""
    role: Literal["agent", "observer", "operator"] = "agent"


class TicketRow(Struct, frozen=True, kw_only=True):
    """A ticket without its secret."""

    id: Name
    label: Annotated[str, Meta(max_length=4096)] = ""
    role: Name
    uses_left: Integer
    expires_in_s: float
    revoked: bool


class OperatorRow(Struct, frozen=True, kw_only=True):
    """An access from another machine."""

    operator: Name
    name: Name
    role: Name


class PeerRow(Struct, frozen=True, kw_only=True):
    """A machine that has joined, with the state that the monitor shows; empty for removed ones."""

    peer: Name
    name: Name
    labels: Labels = {}
    standing: Name
    state: Name = ""
    reason: Text = ""
