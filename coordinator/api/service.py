"""The parts of the coordinator that its HTTP routes use, and the content that their responses
share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import Response

from coordinator.api.log_requests import LogRequests
from coordinator.fleet.auth import json_response
from coordinator.fleet.registry import Registry
from coordinator.fleet.state import Fleet
from coordinator.fleet.task_offers import TaskOffers
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.storage.version_log import VersionLog
from coordinator.transport.sharing import SharingRoutes
from coordinator.transport.weights import WeightTransfer
from protocols.enrollment import certificates
from protocols.enrollment.joining import Chain
from protocols.errors import CommonweightError
from protocols.messages.envelope import Command
from protocols.messages.mqtt import MqttAddress
from protocols.messages.work import PollRequest, PollResponse


class Identity(NamedTuple):
    """What identifies this coordinator to others. `public` verifies its signatures.

    `chain`: the transitions from the CA that gave the fleet its id to this one.
    """

    fleet: str
    ca_pem: bytes
    public: bytes
    chain: Chain = ()

    @property
    def ca_sha256(self) -> bytes:
        return certificates.ca_fingerprint(self.ca_pem)


class CoordinatorService(Protocol):
    """The parts of the coordinator that its HTTP routes use."""

    identity: Identity
    registry: Registry
    offers: TaskOffers
    fleet: Fleet
    transfer: WeightTransfer
    job_transfer: WeightTransfer
    jobs: JobManager
    runs: RunManager
    log_requests: LogRequests
    sharing: SharingRoutes
    version_log: VersionLog

    def addresses(self) -> tuple[str, ...]: ...
    def mqtt_for(self, host: str, user: str) -> MqttAddress: ...
    def fleet_card(self) -> bytes: ...
    async def command(self, peer: str, command: Command) -> str: ...
    async def poll(self, peer: str, request: PollRequest) -> PollResponse: ...


def request_host(request: Request) -> str:
    """The host name that the client used for us. Return it to this client only."""
    try:
        return request.url.hostname or ""
    except ValueError:
        return ""


def error_response(err: CommonweightError, status: int) -> Response:
    return json_response({"code": err.code, "message": err.message, "hint": err.hint}, status)
