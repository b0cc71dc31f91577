"""What an operator may ask over HTTP, and what observers may look at.

    GET  /cw/v1/fleet                  the snapshot of the fleet
    GET  /cw/v1/watch                  what a watcher needs for MQTT
    *    /cw/v1/runs, /jobs, /tickets, /peers, /operators

An operator is the key in this home, or one that joined with that role; what only shows something is
open to observers too. Answers are JSON; an error is `{"code", "message", "hint"}`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.api.schema import STATUS, RunOrder, TicketOrder, WatchAnswer
from coordinator.api.service import Desk, error_answer, host_of, json_answer
from coordinator.fleet import reducer as fleets
from coordinator.fleet.auth import Auth
from coordinator.jobs.messages import job_body
from coordinator.storage.job_events import JobSpec
from protocols.enrollment import tickets
from protocols.errors import CommonweightError, UsageFault
from protocols.messages.envelope import Command

Endpoint = Callable[[Request, bytes], Awaitable[Response]]
T = TypeVar("T")


def operator_routes(
    desk: Desk, auth: Auth, fleet_id: str, ca_sha256: bytes, coordinator_public: bytes
) -> list[Route]:
    """The routes of operators and observers."""

    async def snapshot(_: Request, __: bytes) -> Response:
        return Response(fleets.encode(desk.fleet, time.time()), media_type="application/json")

    async def watch(request: Request, _: bytes) -> Response:
        return json_answer(
            WatchAnswer(
                fleet=fleet_id,
                coordinator_public=coordinator_public,
                mqtt=desk.mqtt_for(host_of(request)),
            )
        )

    async def start_run(_: Request, body: bytes) -> Response:
        order = _decode(body, RunOrder)
        return json_answer({"run": desk.runs.start(order.spec, order.from_digest)})

    async def list_runs(_: Request, __: bytes) -> Response:
        return json_answer(desk.runs.all())

    async def show_run(request: Request, _: bytes) -> Response:
        return json_answer(desk.runs.find(request.path_params["run"]))

    async def stop_run(request: Request, _: bytes) -> Response:
        desk.runs.stop(desk.runs.find(request.path_params["run"]).id)
        return json_answer({})

    async def resume_run(request: Request, _: bytes) -> Response:
        desk.runs.resume(request.path_params["run"])
        return json_answer({})

    async def start_job(_: Request, body: bytes) -> Response:
        return json_answer({"job": desk.jobs.start(_decode(body, JobSpec))})

    async def list_jobs(_: Request, __: bytes) -> Response:
        return json_answer(desk.jobs.all())

    async def show_job(request: Request, _: bytes) -> Response:
        return json_answer(desk.jobs.find(request.path_params["job"]))

    async def stands_job(request: Request, _: bytes) -> Response:
        return json_answer(job_body(desk.jobs.find(request.path_params["job"])))

    async def stop_job(request: Request, _: bytes) -> Response:
        desk.jobs.stop(desk.jobs.find(request.path_params["job"]).id)
        return json_answer({})

    async def take_job(request: Request, _: bytes) -> Response:
        desk.jobs.take(request.path_params["job"])
        return json_answer({})

    async def resume_job(request: Request, _: bytes) -> Response:
        desk.jobs.resume(request.path_params["job"])
        return json_answer({})

    async def make_ticket(_: Request, body: bytes) -> Response:
        order = _decode(body, TicketOrder)
        if not 0 < order.ttl_s <= 366 * 86400 or not 0 < order.uses <= 100_000:
            raise UsageFault("a ticket is good for at most a year and 100,000 machines")
        ticket = tickets.new_ticket(desk.addresses(), ca_sha256)
        desk.registry.create_ticket(
            ticket, ttl_s=order.ttl_s, uses=order.uses, label=order.label, role=order.role
        )
        return json_answer({"ticket": tickets.encode(ticket), "id": ticket.id})

    async def list_tickets(_: Request, __: bytes) -> Response:
        return json_answer(
            [
                {
                    "id": ticket.id,
                    "label": ticket.label,
                    "role": ticket.role,
                    "uses_left": ticket.uses_left,
                    "expires_in_s": ticket.expires_at - time.time(),
                    "revoked": ticket.revoked,
                }
                for ticket in desk.registry.tickets.values()
            ]
        )

    async def revoke_ticket(request: Request, _: bytes) -> Response:
        desk.registry.revoke_ticket(request.path_params["ticket"])
        return json_answer({})

    async def list_peers(_: Request, __: bytes) -> Response:
        return json_answer(
            [
                {"peer": p.peer, "name": p.name, "labels": p.labels, "standing": p.standing}
                for p in desk.registry.peers.values()
            ]
        )

    async def approve(request: Request, _: bytes) -> Response:
        return json_answer({"peer": desk.registry.approve(request.path_params["peer"]).peer})

    async def remove(request: Request, _: bytes) -> Response:
        desk.registry.remove(request.path_params["peer"], "removed by the operator")
        return json_answer({})

    async def command(request: Request, body: bytes) -> Response:
        order = _decode(body, Command)
        peer = desk.registry.find(request.path_params["peer"])
        return json_answer({"outcome": await desk.command(peer.peer, order)})

    async def list_operators(_: Request, __: bytes) -> Response:
        here = [one for one in desk.registry.operators.values() if not one.removed]
        return json_answer([{"operator": o.operator, "name": o.name, "role": o.role} for o in here])

    async def remove_operator(request: Request, _: bytes) -> Response:
        desk.registry.remove_operator(request.path_params["operator"])
        return json_answer({})

    async def ask_logs(request: Request, _: bytes) -> Response:
        peer = desk.registry.find(request.path_params["peer"])
        return json_answer(await desk.logs.ask(peer.peer))

    def observer(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        return operator(endpoint, changes=False)

    def operator(
        endpoint: Endpoint, *, changes: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            try:
                body = await auth.operator(request, changes=changes)
                return await endpoint(request, body)
            except CommonweightError as err:
                return error_answer(err, STATUS.get(err.exit_code, 400))

        return checked

    return [
        Route("/cw/v1/fleet", observer(snapshot)),
        Route("/cw/v1/watch", observer(watch)),
        Route("/cw/v1/runs", observer(list_runs)),
        Route("/cw/v1/runs", operator(start_run), methods=["POST"]),
        Route("/cw/v1/runs/{run}", observer(show_run)),
        Route("/cw/v1/runs/{run}/stop", operator(stop_run), methods=["POST"]),
        Route("/cw/v1/runs/{run}/resume", operator(resume_run), methods=["POST"]),
        Route("/cw/v1/jobs", observer(list_jobs)),
        Route("/cw/v1/jobs", operator(start_job), methods=["POST"]),
        Route("/cw/v1/jobs/{job}", observer(show_job)),
        Route("/cw/v1/jobs/{job}/stands", observer(stands_job)),
        Route("/cw/v1/jobs/{job}/stop", operator(stop_job), methods=["POST"]),
        Route("/cw/v1/jobs/{job}/taken", operator(take_job), methods=["POST"]),
        Route("/cw/v1/jobs/{job}/resume", operator(resume_job), methods=["POST"]),
        Route("/cw/v1/tickets", observer(list_tickets)),
        Route("/cw/v1/tickets", operator(make_ticket), methods=["POST"]),
        Route("/cw/v1/tickets/{ticket}/revoke", operator(revoke_ticket), methods=["POST"]),
        Route("/cw/v1/peers", observer(list_peers)),
        Route("/cw/v1/peers/{peer}/approve", operator(approve), methods=["POST"]),
        Route("/cw/v1/peers/{peer}/remove", operator(remove), methods=["POST"]),
        Route("/cw/v1/peers/{peer}/command", operator(command), methods=["POST"]),
        Route("/cw/v1/peers/{peer}/logs", observer(ask_logs)),
        Route("/cw/v1/operators", observer(list_operators)),
        Route("/cw/v1/operators/{operator}/remove", operator(remove_operator), methods=["POST"]),
    ]


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise UsageFault(f"the request is not right: {err}") from err
