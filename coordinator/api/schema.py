"""Requests and responses of the routes for operators. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from coordinator.storage.run_events import RunSpec
from protocols.enrollment.joining import Card
from protocols.errors import ExitCode
from protocols.messages.envelope import Count, Id, MaybeDigest, Name, PublicKey
from protocols.messages.mqtt import MqttAddress

#: The HTTP status of an error, by the exit code that a command has for it.
STATUS = {ExitCode.USAGE: 422, ExitCode.REFUSED: 403, ExitCode.UNREACHABLE: 503}


class StartRunRequest(Struct, frozen=True, kw_only=True):
    """Start a run. `from_digest` is a version that is already in the home."""

    spec: RunSpec
    from_digest: MaybeDigest = ""


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
