"""The coordinator as its HTTP routes see it, and what all their answers have alike."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from coordinator.api.log_requests import LogRequests
from coordinator.fleet.reducer import Fleet
from coordinator.fleet.registry import Registry
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.transport.sharing import SharingRoutes
from coordinator.transport.weights import WeightTransfer
from protocols.enrollment import identity
from protocols.errors import CommonweightError
from protocols.messages.envelope import Command
from protocols.messages.mqtt import MqttAddress
from protocols.messages.work import PollRequest, PollResponse


class Identity(NamedTuple):
    """How others recognize this coordinator. `public` verifies its signatures."""

    fleet: str
    ca_pem: bytes
    public: bytes

    @property
    def ca_sha256(self) -> bytes:
        return identity.ca_fingerprint(self.ca_pem)


class CoordinatorService(Protocol):
    """The coordinator, as its HTTP routes see it."""

    identity: Identity
    registry: Registry
    fleet: Fleet
    transfer: WeightTransfer
    job_transfer: WeightTransfer
    jobs: JobManager
    runs: RunManager
    log_requests: LogRequests
    sharing: SharingRoutes

    def addresses(self) -> tuple[str, ...]: ...
    def mqtt_for(self, host: str) -> MqttAddress: ...
    async def command(self, peer: str, command: Command) -> str: ...
    async def exchange(self, peer: str, asked: PollRequest) -> PollResponse: ...


def request_host(request: Request) -> str:
    """The name by which the other side knows us: what it calls us goes back to nobody else."""
    try:
        return request.url.hostname or ""
    except ValueError:
        return ""


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def error_response(err: CommonweightError, status: int) -> Response:
    body = {"code": err.code, "message": err.message, "hint": err.hint}
    return Response(msgspec.json.encode(body), status, media_type="application/json")
