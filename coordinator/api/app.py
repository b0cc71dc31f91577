"""Our own HTTP routes beside Flower's: joining, and what enrolled peers ask.

    GET  /cw/v1/ca                     the CA certificate (its hash is in every ticket)
    POST /cw/v1/join                   a machine with a ticket
    GET  /cw/v1/mqtt                   the broker and the login for it     (an enrolled peer)
    POST /cw/v1/exchange               a reply in, the next work out        (an enrolled peer)
    POST /cw/v1/renew                  a new node certificate             (an enrolled peer)
    GET  /cw/v1/standing               how it stands with the coordinator  (a peer)
    POST /cw/v1/leave                  its key is refused from now on      (a peer)
    POST /cw/v1/operators/join         somebody with a ticket for watching
    POST /cw/v1/logs                   log lines that were asked for        (an enrolled peer)

What operators and observers ask is in the folder `routes`; the lanes bring routes of their own.
Errors are bare: a stranger learns nothing from them.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.api.routes import fleet, jobs, runs, tickets
from coordinator.api.service import CoordinatorService, error_response, json_response, request_host
from coordinator.fleet.auth import Auth, read_body
from coordinator.fleet.registry import Peer
from coordinator.fleet.sessions import NoSession
from protocols import VERSION
from protocols.enrollment import identity
from protocols.enrollment.identity import NodeCertificate
from protocols.enrollment.joining import (
    CA_PATH,
    ENROLLMENT_STATUS_PATH,
    JOIN_PATH,
    LEAVE_PATH,
    MQTT_PATH,
    OPERATOR_JOIN_PATH,
    RENEW_PATH,
    EnrollmentStatus,
    JoinRequest,
    JoinResponse,
    OperatorJoinRequest,
    OperatorJoinResponse,
)
from protocols.errors import BadMessage, CommonweightError
from protocols.messages.envelope import LOGS_PATH, LogResponse
from protocols.messages.jobs import ANSWER_PATH, INPUT_PATH
from protocols.messages.work import POLL_PATH, PollRequest

#: Messages are small: weights travel on the lane.
MAX_EXCHANGE_BYTES = 1024 * 1024
MAX_LOGS_BYTES = 512 * 1024


def make_app(service: CoordinatorService, auth: Auth, ca_key: Any) -> Starlette:
    """The ASGI app of our own routes."""
    fleet_id, ca_pem, coordinator_public = service.identity

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
        return identity.issue_certificate(ca_key, certificate)

    async def renew(request: Request) -> Response:
        return Response(certify(await auth.peer(request)), media_type="application/octet-stream")

    async def join(request: Request) -> Response:
        try:
            joining = msgspec.json.decode(await read_body(request, 16 * 1024), type=JoinRequest)
            peer = service.registry.join(joining)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise HTTPException(400) from err
        except CommonweightError as err:
            return error_response(err, 403)
        mqtt = service.mqtt_for(request_host(request))
        if peer.standing == "awaiting":  # the login opens the whole fleet's talk: not yet
            mqtt = msgspec.structs.replace(mqtt, user="", password="")
        return json_response(
            JoinResponse(
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
            asked = msgspec.msgpack.decode(body, type=PollRequest)
            if asked.reply is not None and asked.update:
                await service.transfer.receive_inline(peer.peer, asked.update)
            answer = await service.exchange(peer.peer, asked)
        except NoSession as err:
            raise HTTPException(412) from err
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, BadMessage) as err:
            raise HTTPException(400) from err
        return Response(msgspec.msgpack.encode(answer), media_type="application/msgpack")

    async def mqtt(request: Request) -> Response:
        await auth.peer(request)
        return json_response(service.mqtt_for(request_host(request)))

    async def standing(request: Request) -> Response:
        peer = await auth.peer(request, or_awaiting=True)
        assert peer.standing != "removed", "auth lets no removed peer through"
        return json_response(
            EnrollmentStatus(
                peer=peer.peer, name=peer.name, enrollment=peer.standing, version=VERSION
            )
        )

    async def leave(request: Request) -> Response:
        peer = await auth.peer(request, or_awaiting=True)
        service.registry.remove(peer.peer, "left by itself")
        return json_response({})

    async def join_operator(request: Request) -> Response:
        try:
            joining = msgspec.json.decode(
                await read_body(request, 16 * 1024), type=OperatorJoinRequest
            )
            joined = service.registry.join_operator(joining)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise HTTPException(400) from err
        except CommonweightError as err:
            return error_response(err, 403)
        return json_response(
            OperatorJoinResponse(operator=joined.operator, role=joined.role, fleet=fleet_id)
        )

    async def tell_logs(request: Request) -> Response:
        peer, body = await auth.peer_and_body(request, MAX_LOGS_BYTES)
        try:
            told = msgspec.json.decode(body, type=LogResponse)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise HTTPException(400) from err
        return Response(status_code=204 if service.log_requests.receive(peer.peer, told) else 410)

    routes = [
        Route(CA_PATH, ca),
        Route(JOIN_PATH, join, methods=["POST"]),
        Route(POLL_PATH, exchange, methods=["POST"]),
        Route(MQTT_PATH, mqtt),
        Route(ENROLLMENT_STATUS_PATH, standing),
        Route(RENEW_PATH, renew, methods=["POST"]),
        Route(LEAVE_PATH, leave, methods=["POST"]),
        Route(LOGS_PATH, tell_logs, methods=["POST"]),
        Route(OPERATOR_JOIN_PATH, join_operator, methods=["POST"]),
        *(
            one.route(service, auth)
            for subject in (fleet, runs, jobs, tickets)
            for one in subject.ROUTES
        ),
    ]
    for method, path, endpoint in (
        *service.transfer.routes(auth),
        *service.transfer.patch_routes(auth),
        *service.job_transfer.routes(auth, INPUT_PATH, ANSWER_PATH),
        *service.sharing.routes(auth),
    ):
        routes.append(Route(path, endpoint, methods=[method]))
    return Starlette(routes=routes)
