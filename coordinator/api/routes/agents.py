"""The requests of agents: to join, for work, for a certificate; and how an operator joins.

GET  /cw/v1/ca                the CA certificate (its hash is in every ticket)
GET  /cw/v1/ca/transitions    how this CA took the place of earlier ones, and the fleet card
POST /cw/v1/join              join with a ticket
POST /cw/v1/exchange          send a reply, get the next work     (an enrolled peer)
GET  /cw/v1/mqtt              the address and login of the broker (an enrolled peer)
GET  /cw/v1/log/{start}       entries of the log of versions      (an enrolled peer)
GET  /cw/v1/models/{name}/{which}  the best or latest version of a run (an enrolled peer)
GET  /cw/v1/offers            the signed list of offered tasks    (an enrolled peer)
GET  /cw/v1/offers/{digest}   an offered file                     (an enrolled peer)
POST /cw/v1/renew             a new node certificate              (an enrolled peer)
POST /cw/v1/comparisons       what an ended run brought a peer    (an enrolled peer)
POST /cw/v1/logs              log lines that were requested       (an enrolled peer)
GET  /cw/v1/standing          enrollment status                   (also while awaiting)
POST /cw/v1/leave             refuse this peer's key from now on  (also while awaiting)
POST /cw/v1/operators/join    join as an operator or observer with a ticket
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.api import named_models
from coordinator.api.comparisons import ComparisonInbox
from coordinator.api.service import CoordinatorService, error_response, request_host
from coordinator.fleet.auth import Auth, decode_body, json_response, read_body
from coordinator.fleet.members import Peer
from coordinator.fleet.sessions import NoSession
from protocols import VERSION
from protocols.enrollment import certificates, joining
from protocols.enrollment.ca_chain import ChainResponse
from protocols.errors import BadMessage, CommonweightError, Refused, StorageUnreachable
from protocols.messages import offers
from protocols.messages.comparisons import COMPARISONS_PATH, MAX_COMPARISON_BYTES, Comparison
from protocols.messages.envelope import LOGS_PATH, LogResponse
from protocols.messages.version_log import LOG_PATH
from protocols.messages.work import MODEL_PATH, POLL_PATH, PollRequest

MAX_JOIN_BYTES = 16 * 1024
#: Weights have routes of their own, so messages are small.
MAX_POLL_BYTES = 1024 * 1024
MAX_LOGS_BYTES = 512 * 1024
#: Of a place in the log.
_MAX_DIGITS = 15


class AgentRoutes:
    """The handlers. `ca_key` signs node certificates, as the CA or as its `issuer` (PEM)."""

    def __init__(
        self, service: CoordinatorService, auth: Auth, ca_key: Any, issuer: bytes = b""
    ) -> None:
        self._issuer = issuer
        self._service, self._auth, self._ca_key = service, auth, ca_key
        self._comparisons = ComparisonInbox(service.runs)

    def routes(self) -> list[Route]:
        return [
            Route(joining.CA_PATH, self._ca),
            Route(joining.CA_CHAIN_PATH, self._ca_chain),
            Route(joining.JOIN_PATH, self._join, methods=["POST"]),
            Route(POLL_PATH, self._poll, methods=["POST"]),
            Route(joining.MQTT_PATH, self._mqtt),
            Route(LOG_PATH, self._log),
            Route(MODEL_PATH, self._model),
            Route(offers.LIST_PATH, self._offers),
            Route(offers.FILE_PATH, self._offered_file),
            Route(joining.ENROLLMENT_STATUS_PATH, self._status),
            Route(joining.RENEW_PATH, self._renew, methods=["POST"]),
            Route(joining.LEAVE_PATH, self._leave, methods=["POST"]),
            Route(COMPARISONS_PATH, self._compared, methods=["POST"]),
            Route(LOGS_PATH, self._logs, methods=["POST"]),
            Route(joining.OPERATOR_JOIN_PATH, self._join_operator, methods=["POST"]),
        ]

    async def _ca(self, _: Request) -> Response:
        return Response(self._service.identity.ca_pem, media_type="application/x-pem-file")

    async def _ca_chain(self, _: Request) -> Response:
        chain, card = self._service.identity.chain, self._service.fleet_card()
        return json_response(ChainResponse(transitions=chain, card=card))

    def _check_follows(self, request: joining.JoinRequest | joining.OperatorJoinRequest) -> None:
        """Raise Refused for a version that cannot check this fleet's CA."""
        if self._service.identity.chain and not request.follows_ca:
            raise Refused(
                f"this fleet has replaced its CA, and commonweight {request.version} on this "
                "machine cannot check that",
                "update it: pip install --upgrade commonweight",
            )

    async def _join(self, request: Request) -> Response:
        body = decode_body(await read_body(request, MAX_JOIN_BYTES), joining.JoinRequest)
        try:
            self._check_follows(body)
            await self._service.registry.until_writable()
            peer = self._service.registry.join(body)
        except StorageUnreachable:
            raise
        except CommonweightError as err:
            return error_response(err, 403)
        mqtt = self._service.mqtt_for(request_host(request), peer.peer)
        if peer.standing == "awaiting":
            mqtt = msgspec.structs.replace(mqtt, user="", password="")
        return json_response(
            joining.JoinResponse(
                peer=peer.peer,
                name=peer.name,
                fleet=self._service.identity.fleet,
                certificate=self._certificate(peer),
                coordinator_public=self._service.identity.public,
                mqtt=mqtt,
                awaiting=peer.standing == "awaiting",
                card=self._service.fleet_card(),
                transitions=self._service.identity.chain,
            )
        )

    def _certificate(self, peer: Peer) -> bytes:
        certificate = certificates.NodeCertificate(
            fleet=self._service.identity.fleet,
            peer=peer.peer,
            name=peer.name,
            sign_public=peer.sign_public,
            node_public=peer.node_public,
            not_after=time.time() + certificates.CERTIFICATE_DAYS * 86400,
            issuer=self._issuer,
        )
        return certificates.issue_certificate(self._ca_key, certificate)

    async def _renew(self, request: Request) -> Response:
        peer = await self._auth.peer(request)
        certificate = self._certificate(peer)
        await self._service.registry.note_ca(peer.peer)
        return Response(certificate, media_type="application/octet-stream")

    async def _poll(self, request: Request) -> Response:
        peer, poll = await self._auth.peer_and_struct(
            request, PollRequest, MAX_POLL_BYTES, msgspec.msgpack
        )
        try:
            response = await self._service.poll(peer.peer, poll)
        except NoSession as err:
            raise HTTPException(412) from err
        except BadMessage as err:
            raise HTTPException(400) from err
        return Response(msgspec.msgpack.encode(response), media_type="application/msgpack")

    async def _mqtt(self, request: Request) -> Response:
        peer = await self._auth.peer(request)
        mqtt = self._service.mqtt_for(request_host(request), peer.peer)
        address = msgspec.structs.asdict(mqtt)
        return json_response(joining.MqttResponse(**address, card=self._service.fleet_card()))

    async def _log(self, request: Request) -> Response:
        await self._auth.peer(request)
        # Not a converter of the route: it would fail for a long number, before the signature.
        start = request.path_params["start"]
        if not (start.isascii() and start.isdigit() and len(start) <= _MAX_DIGITS):
            raise HTTPException(404)
        start = int(start)
        page = await asyncio.to_thread(self._service.version_log.page, start)
        return Response(page, media_type="application/json")

    async def _model(self, request: Request) -> Response:
        await self._auth.peer(request)
        name, which = request.path_params["name"], request.path_params["which"]
        try:
            return json_response(named_models.find(self._service, name, which))
        except CommonweightError as err:
            return error_response(err, 404)

    async def _offers(self, request: Request) -> Response:
        await self._auth.peer(request)
        signed = self._service.offers.signed_list()
        return Response(signed, media_type="application/octet-stream")

    async def _offered_file(self, request: Request) -> Response:
        await self._auth.peer(request)
        data = self._service.offers.file(request.path_params["digest"])
        if data is None:
            raise HTTPException(404)
        return Response(data, media_type="application/octet-stream")

    async def _status(self, request: Request) -> Response:
        peer = await self._auth.peer(request, or_awaiting=True)
        assert peer.standing != "removed", "auth refuses removed peers"
        return json_response(
            joining.EnrollmentStatus(
                peer=peer.peer, name=peer.name, enrollment=peer.standing, version=VERSION
            )
        )

    async def _leave(self, request: Request) -> Response:
        peer = await self._auth.peer(request, or_awaiting=True)
        await self._service.registry.until_writable()
        self._service.registry.remove(peer.peer, "left by itself")
        return json_response({})

    async def _logs(self, request: Request) -> Response:
        peer, body = await self._auth.peer_and_struct(request, LogResponse, MAX_LOGS_BYTES)
        is_expected = self._service.log_requests.receive(peer.peer, body)
        return Response(status_code=204 if is_expected else 410)

    async def _compared(self, request: Request) -> Response:
        peer, told = await self._auth.peer_and_struct(request, Comparison, MAX_COMPARISON_BYTES)
        try:
            await self._service.registry.until_writable()
            self._comparisons.take(peer.peer, told)
        except StorageUnreachable:
            raise
        except CommonweightError as err:
            return error_response(err, 409)
        return Response(status_code=204)

    async def _join_operator(self, request: Request) -> Response:
        body = decode_body(await read_body(request, MAX_JOIN_BYTES), joining.OperatorJoinRequest)
        try:
            self._check_follows(body)
            await self._service.registry.until_writable()
            operator = self._service.registry.join_operator(body)
        except StorageUnreachable:
            raise
        except CommonweightError as err:
            return error_response(err, 403)
        return json_response(
            joining.OperatorJoinResponse(
                operator=operator.operator,
                role=operator.role,
                fleet=self._service.identity.fleet,
                card=self._service.fleet_card(),
                transitions=self._service.identity.chain,
            )
        )
