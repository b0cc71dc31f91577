"""What an operator's commands send to the coordinator and get from it. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from coordinator.storage.run_events import RunSpec
from protocols.errors import ExitCode
from protocols.messages.mqtt import MqttAddress

#: How an error of the coordinator's travels: the HTTP status that stands for a command's exit code.
STATUS = {ExitCode.USAGE: 422, ExitCode.REFUSED: 403, ExitCode.UNREACHABLE: 503}


class StartRunRequest(Struct, frozen=True, kw_only=True):
    """A run to be started. `from_digest` names a version that lies in the home already."""

    spec: RunSpec
    from_digest: str = ""


class WatchResponse(Struct, frozen=True, kw_only=True):
    """What a watcher needs to follow the fleet over MQTT."""

    fleet: str
    coordinator_public: bytes
    mqtt: MqttAddress


class TicketRequest(Struct, frozen=True, kw_only=True):
    """A ticket to be made: seconds it is good for, for how many machines, and for whom."""

    ttl_s: float = 86400.0
    uses: int = 1
    label: str = ""
    role: Literal["agent", "observer", "operator"] = "agent"
