"""The coordinator as its HTTP routes see it, and what all their answers have alike."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from coordinator.enroll import Registry
from coordinator.fleet import Fleet
from coordinator.job_lane import JobLane
from coordinator.job_queue import JobQueue
from coordinator.lane import Lane
from coordinator.log_desk import LogDesk
from coordinator.run_queue import RunQueue
from coordinator.sharing import SharingDesk
from protocols.errors import CommonweightError
from protocols.exchange import Exchange, Exchanged
from protocols.messages import Command
from protocols.mqtt import MqttAddress


class Desk(Protocol):
    """The coordinator, as its HTTP routes see it."""

    registry: Registry
    fleet: Fleet
    lane: Lane
    job_lane: JobLane
    jobs: JobQueue
    runs: RunQueue
    logs: LogDesk
    sharing: SharingDesk

    def addresses(self) -> tuple[str, ...]: ...
    def mqtt_for(self, host: str) -> MqttAddress: ...
    async def command(self, peer: str, command: Command) -> str: ...
    async def exchange(self, peer: str, asked: Exchange) -> Exchanged: ...


def host_of(request: Request) -> str:
    """The name by which the other side knows us: what it calls us goes back to nobody else."""
    try:
        return request.url.hostname or ""
    except ValueError:
        return ""


def json_answer(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def error_answer(err: CommonweightError, status: int) -> Response:
    body = {"code": err.code, "message": err.message, "hint": err.hint}
    return Response(msgspec.json.encode(body), status, media_type="application/json")
