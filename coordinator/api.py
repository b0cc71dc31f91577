"""Our own HTTP routes beside Flower's: joining, and what an operator may ask.

    GET  /cw/v1/ca                     the CA certificate (its hash is in every ticket)
    POST /cw/v1/join                   a machine with a ticket
    GET  /cw/v1/mqtt                   the broker and the login for it     (an enrolled peer)
    POST /cw/v1/exchange               a reply in, the next work out        (an enrolled peer)
    POST /cw/v1/renew                  a new node certificate             (an enrolled peer)
    GET  /cw/v1/standing               how it stands with the coordinator  (a peer)
    POST /cw/v1/leave                  its key is refused from now on      (a peer)
    GET  /cw/v1/fleet                  the snapshot of the fleet            (operator)
    GET  /cw/v1/watch                  what a watcher needs for MQTT        (operator)
    *    /cw/v1/runs, /jobs, /tickets, /peers, /operators                          (operator)
    POST /cw/v1/operators/join         somebody with a ticket for watching
    POST /cw/v1/logs                   log lines that were asked for        (an enrolled peer)

"operator" is the key in this home, or one that joined with that role; what only shows something is
open to observers too.

Answers are JSON; an error is `{"code", "message", "hint"}` for the operator and bare for others.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator import fleet as fleets
from coordinator.auth import Auth, read_body
from coordinator.bodies import job_body
from coordinator.enroll import Peer, Registry
from coordinator.fleet import Fleet
from coordinator.job_facts import JobSpec
from coordinator.job_lane import JobLane
from coordinator.job_queue import JobQueue
from coordinator.lane import Lane
from coordinator.log_desk import LogDesk
from coordinator.orders import RunOrder, TicketOrder, WatchAnswer
from coordinator.run_queue import RunQueue
from coordinator.sessions import NoSession
from coordinator.sharing import SharingDesk
from protocols import VERSION, identity, tickets
from protocols.errors import BadMessage, CommonweightError, ExitCode, UsageFault
from protocols.identity import NodeCertificate
from protocols.joining import (
    CA_PATH,
    JOIN_PATH,
    LEAVE_PATH,
    MQTT_PATH,
    OPERATOR_JOIN_PATH,
    RENEW_PATH,
    STANDING_PATH,
    JoinAnswer,
    Joining,
    OperatorAnswer,
    OperatorJoining,
    StandingAnswer,
)
from protocols.messages import EXCHANGE_PATH, LOGS_PATH, Command, Exchange, Exchanged, LogsTold
from protocols.mqtt import MqttAddress

#: Messages are small: weights travel on the lane.
MAX_EXCHANGE_BYTES = 1024 * 1024
MAX_LOGS_BYTES = 512 * 1024
_STATUS = {ExitCode.USAGE: 422, ExitCode.REFUSED: 403, ExitCode.NOT_RUNNING: 409}


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


def make_app(
    desk: Desk, auth: Auth, fleet_id: str, ca_key: Any, ca_pem: bytes, coordinator_public: bytes
) -> Starlette:
    """The ASGI app of our own routes."""
    ca_sha256 = identity.ca_fingerprint(ca_pem)

    async def ca(_: Request) -> Response:
        return Response(ca_pem, media_type="application/x-pem-file")

    def certify(peer: Peer) -> bytes:
        certificate = NodeCertificate(
            fleet=fleet_id,
            peer=peer.peer,
            name=peer.name,
            sign_public=peer.sign_public,
            node_public=peer.node_public,
            not_after=time.time() + identity.CERTIFICATE_DAYS * 86400,
        )
        return identity.issue(ca_key, certificate)

    async def renew(request: Request) -> Response:
        return Response(certify(await auth.peer(request)), media_type="application/octet-stream")

    async def join(request: Request) -> Response:
        try:
            joining = msgspec.json.decode(await read_body(request, 16 * 1024), type=Joining)
            peer = desk.registry.join(joining)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise HTTPException(400) from err
        except CommonweightError as err:
            return _error(err, 403)
        mqtt = desk.mqtt_for(_host(request))
        if peer.standing == "awaiting":  # the login opens the whole fleet's talk: not yet
            mqtt = msgspec.structs.replace(mqtt, user="", password="")
        return _json(
            JoinAnswer(
                peer=peer.peer,
                name=peer.name,
                fleet=fleet_id,
                certificate=certify(peer),
                coordinator_public=coordinator_public,
                mqtt=mqtt,
                awaiting=peer.standing == "awaiting",
            )
        )

    async def exchange(request: Request) -> Response:
        peer, body = await auth.peer_and_body(request, MAX_EXCHANGE_BYTES)
        try:
            asked = msgspec.msgpack.decode(body, type=Exchange)
            if asked.reply is not None and asked.update:
                await desk.lane.take(peer.peer, asked.update)
            answer = await desk.exchange(peer.peer, asked)
        except NoSession as err:
            raise HTTPException(412) from err
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, BadMessage) as err:
            raise HTTPException(400) from err
        return Response(msgspec.msgpack.encode(answer), media_type="application/msgpack")

    async def mqtt(request: Request) -> Response:
        await auth.peer(request)
        return _json(desk.mqtt_for(_host(request)))

    async def standing(request: Request) -> Response:
        peer = await auth.peer(request, or_awaiting=True)
        assert peer.standing != "removed", "auth lets no removed peer through"
        return _json(
            StandingAnswer(peer=peer.peer, name=peer.name, standing=peer.standing, version=VERSION)
        )

    async def leave(request: Request) -> Response:
        peer = await auth.peer(request, or_awaiting=True)
        desk.registry.remove(peer.peer, "left by itself")
        return _json({})

    async def snapshot(_: Request, __: bytes) -> Response:
        return Response(fleets.encode(desk.fleet, time.time()), media_type="application/json")

    async def watch(request: Request, _: bytes) -> Response:
        return _json(
            WatchAnswer(
                fleet=fleet_id,
                coordinator_public=coordinator_public,
                mqtt=desk.mqtt_for(_host(request)),
            )
        )

    async def start_run(_: Request, body: bytes) -> Response:
        order = _decode(body, RunOrder)
        return _json({"run": desk.runs.start(order.spec, order.from_digest)})

    async def list_runs(_: Request, __: bytes) -> Response:
        return _json(desk.runs.all())

    async def show_run(request: Request, _: bytes) -> Response:
        return _json(desk.runs.find(request.path_params["run"]))

    async def stop_run(request: Request, _: bytes) -> Response:
        desk.runs.stop(desk.runs.find(request.path_params["run"]).id)
        return _json({})

    async def resume_run(request: Request, _: bytes) -> Response:
        desk.runs.resume(request.path_params["run"])
        return _json({})

    async def start_job(_: Request, body: bytes) -> Response:
        return _json({"job": desk.jobs.start(_decode(body, JobSpec))})

    async def list_jobs(_: Request, __: bytes) -> Response:
        return _json(desk.jobs.all())

    async def show_job(request: Request, _: bytes) -> Response:
        return _json(desk.jobs.find(request.path_params["job"]))

    async def stands_job(request: Request, _: bytes) -> Response:
        return _json(job_body(desk.jobs.find(request.path_params["job"])))

    async def stop_job(request: Request, _: bytes) -> Response:
        desk.jobs.stop(desk.jobs.find(request.path_params["job"]).id)
        return _json({})

    async def resume_job(request: Request, _: bytes) -> Response:
        desk.jobs.resume(request.path_params["job"])
        return _json({})

    async def make_ticket(_: Request, body: bytes) -> Response:
        order = _decode(body, TicketOrder)
        if not 0 < order.ttl_s <= 366 * 86400 or not 0 < order.uses <= 100_000:
            raise UsageFault("a ticket is good for at most a year and 100,000 machines")
        ticket = tickets.new_ticket(desk.addresses(), ca_sha256)
        desk.registry.create_ticket(
            ticket, ttl_s=order.ttl_s, uses=order.uses, label=order.label, role=order.role
        )
        return _json({"ticket": tickets.encode(ticket), "id": ticket.id})

    async def list_tickets(_: Request, __: bytes) -> Response:
        return _json(
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
        return _json({})

    async def list_peers(_: Request, __: bytes) -> Response:
        return _json(
            [
                {"peer": p.peer, "name": p.name, "labels": p.labels, "standing": p.standing}
                for p in desk.registry.peers.values()
            ]
        )

    async def approve(request: Request, _: bytes) -> Response:
        return _json({"peer": desk.registry.approve(request.path_params["peer"]).peer})

    async def remove(request: Request, _: bytes) -> Response:
        desk.registry.remove(request.path_params["peer"], "removed by the operator")
        return _json({})

    async def command(request: Request, body: bytes) -> Response:
        order = _decode(body, Command)
        peer = desk.registry.find(request.path_params["peer"])
        return _json({"outcome": await desk.command(peer.peer, order)})

    async def join_operator(request: Request) -> Response:
        try:
            joining = msgspec.json.decode(await read_body(request, 16 * 1024), type=OperatorJoining)
            joined = desk.registry.join_operator(joining)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise HTTPException(400) from err
        except CommonweightError as err:
            return _error(err, 403)
        return _json(OperatorAnswer(operator=joined.operator, role=joined.role, fleet=fleet_id))

    async def list_operators(_: Request, __: bytes) -> Response:
        here = [one for one in desk.registry.operators.values() if not one.removed]
        return _json([{"operator": o.operator, "name": o.name, "role": o.role} for o in here])

    async def remove_operator(request: Request, _: bytes) -> Response:
        desk.registry.remove_operator(request.path_params["operator"])
        return _json({})

    async def ask_logs(request: Request, _: bytes) -> Response:
        peer = desk.registry.find(request.path_params["peer"])
        return _json(await desk.logs.ask(peer.peer))

    async def tell_logs(request: Request) -> Response:
        peer, body = await auth.peer_and_body(request, MAX_LOGS_BYTES)
        try:
            told = msgspec.json.decode(body, type=LogsTold)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise HTTPException(400) from err
        return Response(status_code=204 if desk.logs.told(peer.peer, told) else 410)

    Endpoint = Callable[[Request, bytes], Awaitable[Response]]

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
                return _error(err, _STATUS.get(err.exit_code, 400))

        return checked

    routes = [
        Route(CA_PATH, ca),
        Route(JOIN_PATH, join, methods=["POST"]),
        Route(EXCHANGE_PATH, exchange, methods=["POST"]),
        Route(MQTT_PATH, mqtt),
        Route(STANDING_PATH, standing),
        Route(RENEW_PATH, renew, methods=["POST"]),
        Route(LEAVE_PATH, leave, methods=["POST"]),
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
        Route("/cw/v1/jobs/{job}/resume", operator(resume_job), methods=["POST"]),
        Route("/cw/v1/tickets", observer(list_tickets)),
        Route("/cw/v1/tickets", operator(make_ticket), methods=["POST"]),
        Route("/cw/v1/tickets/{ticket}/revoke", operator(revoke_ticket), methods=["POST"]),
        Route("/cw/v1/peers", observer(list_peers)),
        Route("/cw/v1/peers/{peer}/approve", operator(approve), methods=["POST"]),
        Route("/cw/v1/peers/{peer}/remove", operator(remove), methods=["POST"]),
        Route("/cw/v1/peers/{peer}/command", operator(command), methods=["POST"]),
        Route("/cw/v1/peers/{peer}/logs", observer(ask_logs)),
        Route(LOGS_PATH, tell_logs, methods=["POST"]),
        Route(OPERATOR_JOIN_PATH, join_operator, methods=["POST"]),
        Route("/cw/v1/operators", observer(list_operators)),
        Route("/cw/v1/operators/{operator}/remove", operator(remove_operator), methods=["POST"]),
    ]
    for method, path, endpoint in (
        *desk.lane.routes(auth),
        *desk.job_lane.routes(auth),
        *desk.sharing.routes(auth),
    ):
        routes.append(Route(path, endpoint, methods=[method]))
    return Starlette(routes=routes)


T = TypeVar("T")


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise UsageFault(f"the request is not right: {err}") from err


def _host(request: Request) -> str:
    """The name by which the other side knows us: what it calls us goes back to nobody else."""
    try:
        return request.url.hostname or ""
    except ValueError:
        return ""


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(err: CommonweightError, status: int) -> Response:
    body = {"code": err.code, "message": err.message, "hint": err.hint}
    return Response(msgspec.json.encode(body), status, media_type="application/json")
