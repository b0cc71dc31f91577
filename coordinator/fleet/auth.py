"""Authenticates signed requests, and reads their bodies.

A refusal is a bare 401 or 403. The reason is in the log, and in the response only if the sender's
signature is valid and its owner must act. The sender is checked before the body is read: the
signature covers the body's digest, which is in the head. A request is accepted once, and never if
it was signed before this coordinator started, because the nonces of earlier runs of the program are
not stored.
"""

from __future__ import annotations

import hashlib
import logging
import time
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from coordinator.fleet.members import Peer
from coordinator.fleet.registry import Registry
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.signed_requests import EMPTY_SHA256, SENDER, NonceCache, SignedRequest
from protocols.errors import BadMessage, Refused
from protocols.messages.decoding import MALFORMED
from protocols.messages.envelope import strip_controls

log = logging.getLogger("commonweight.auth")

OPERATOR = "operator"
MAX_JSON_BYTES = 256 * 1024
#: Refusals logged in one second. The rest are only counted.
_MAX_LINES_PER_S = 10
_DOWNGRADED = (
    "Upgrade it again, or join again with a new key: commonweight-agent join TICKET --replace"
)

T = TypeVar("T")


class Auth:
    """Checks the signatures of peers and operators, and that no request is accepted twice.

    `fleet`: our id, which requests name as their receiver.
    """

    def __init__(self, registry: Registry, operator_public: bytes, fleet: str = "") -> None:
        self._registry, self._fleet = registry, fleet
        #: Senders whose requests name their receiver: the older format is refused from them.
        self._name_receiver: set[str] = set()
        self._operator = operator_public
        self._nonces = NonceCache()
        self._since = time.time()
        self._second, self._lines = 0, 0

    async def peer(
        self, request: Request, body_sha256: str = EMPTY_SHA256, *, or_awaiting: bool = False
    ) -> Peer:
        """The enrolled peer that signed this digest; with `or_awaiting`, also one that waits for
        approval."""
        signed = self._read(request)
        if signed.body_sha256 != body_sha256:
            raise self._refuse(request, 401, "the body is not the one that was signed")
        return self._peer(request, signed, or_awaiting=or_awaiting)

    async def peer_and_body(self, request: Request, limit: int) -> tuple[Peer, bytes]:
        """The enrolled peer that signed the request, and the body of at most `limit` bytes."""
        signed = self._read(request)
        peer = self._peer(request, signed)
        body = await self._body(request, signed, limit)
        if not self.is_enrolled(peer.peer):  # removed while it was sending
            raise self._refuse(request, 401, f"{peer.name} is not enrolled any more")
        return peer, body

    async def peer_and_struct(
        self, request: Request, kind: type[T], limit: int, codec: Any = msgspec.json
    ) -> tuple[Peer, T]:
        """The enrolled peer that signed the request, and the decoded body."""
        peer, body = await self.peer_and_body(request, limit)
        return peer, decode_body(body, kind, codec)

    async def operator(self, request: Request, *, or_observer: bool = False) -> bytes:
        """The body of a request that an operator signed; with `or_observer`, also an observer.

        Raises Refused for an observer whose request is for operators.
        """
        signed = self._read(request)
        if signed.sender == OPERATOR:
            self._check(request, signed, self._operator)
            return await self._body(request, signed, MAX_JSON_BYTES)
        known = self._registry.operators.get(signed.sender)
        if known is None or known.removed:
            raise self._refuse(request, 401, f"{signed.sender} is no operator")
        self._check(request, signed, known.sign_public)
        await self._registry.note_ca(known.operator)
        if not or_observer and known.role != "operator":
            self._refuse(request, 403, f"{known.name} is an observer")
            raise Refused(
                "this access may only watch the state of the fleet; "
                f"{request.method} {strip_controls(_path(request))} is for operators",
                "ask the operator for: commonweight ticket create --role operator",
            )
        return await self._body(request, signed, MAX_JSON_BYTES)

    def operator_key(self, request: Request) -> tuple[str, bytes]:
        """The id and the public key of the operator whose request `operator` accepted."""
        sender = request.headers[SENDER]
        if sender == OPERATOR:
            return sender, self._operator
        return sender, self._registry.operators[sender].sign_public

    def signature_format(self, sender: str) -> int:
        """The format in which this peer or operator signs its requests, as far as we have seen."""
        return signed_requests.FORMAT if sender in self._name_receiver else 1

    def is_enrolled(self, peer_id: str) -> bool:
        peer = self._registry.peers.get(peer_id)
        return peer is not None and peer.standing == "enrolled"

    def _peer(self, request: Request, signed: SignedRequest, *, or_awaiting: bool = False) -> Peer:
        peer = self._registry.peers.get(signed.sender)
        if peer is None or peer.standing == "removed":
            raise self._refuse(request, 401, f"{signed.sender} is not enrolled")
        self._check(request, signed, peer.sign_public)
        if peer.standing != "enrolled" and not or_awaiting:
            raise self._refuse(request, 403, f"{peer.name} awaits approval")
        return peer

    async def _body(self, request: Request, signed: SignedRequest, limit: int) -> bytes:
        body = await read_body(request, limit)
        if hashlib.sha256(body).hexdigest() != signed.body_sha256:
            raise self._refuse(request, 401, "the body is not the one that was signed")
        return body

    def _read(self, request: Request) -> SignedRequest:
        try:
            return signed_requests.parse(
                request.method, _path(request), request.headers, time.time(), self._fleet
            )
        except BadMessage as err:
            raise self._refuse(request, 401, err.message) from err

    def _check(self, request: Request, signed: SignedRequest, public: bytes) -> None:
        if not identity.verify(public, signed.signature, signed.message):
            raise self._refuse(request, 401, f"the signature is not that of {signed.sender}")
        if not signed.receiver and signed.sender in self._name_receiver:
            known = self._registry.peers.get(signed.sender)
            name = known.name if known else signed.sender
            why = f"{name} signs requests as an older version does, unlike before. {_DOWNGRADED}"
            raise self._refuse(request, 401, why, f"this agent was downgraded. {_DOWNGRADED}")
        sent_before = signed.at <= self._since
        if sent_before or not self._nonces.use(signed.sender, signed.nonce, time.time()):
            raise self._refuse(request, 401, "the request was sent before")
        # Programs of two versions can use the key in our home, such as a monitor that runs on.
        if signed.receiver and signed.sender != OPERATOR:
            self._name_receiver.add(signed.sender)

    def _refuse(
        self, request: Request, status: int, why: str, response: str | None = None
    ) -> HTTPException:
        now = int(time.monotonic())
        if now != self._second:
            if self._lines > _MAX_LINES_PER_S:
                log.warning("refused %d more requests", self._lines - _MAX_LINES_PER_S)
            self._second, self._lines = now, 0
        self._lines += 1
        if self._lines <= _MAX_LINES_PER_S:
            path = strip_controls(_path(request))
            log.warning("refused %s %s: %s", request.method, path, strip_controls(why))
        return HTTPException(status, response)


async def read_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """A small body. Raises HTTPException 413 as soon as it exceeds `limit` bytes."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise HTTPException(413)
    except ClientDisconnect as err:  # without a traceback in the log
        raise HTTPException(400) from err
    return bytes(body)


def decode_body(body: bytes, kind: type[T], codec: Any = msgspec.json) -> T:
    """`body` as a `kind`. Raises HTTPException 400."""
    try:
        decoded: T = codec.decode(body, type=kind)
    except MALFORMED as err:
        raise HTTPException(400) from err
    return decoded


def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _path(request: Request) -> str:
    # Not `request.url`: it contains the Host header, which the client chooses.
    path: str = request.scope["path"]
    query = request.scope["query_string"].decode("latin-1")
    return path + (f"?{query}" if query else "")
