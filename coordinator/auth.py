"""Who asks: the check of signed requests on our own routes.

A request is refused with a bare 401 or 403; what was wrong stands in the log, not in the answer.
"""

from __future__ import annotations

import hashlib
import logging
import time

from starlette.exceptions import HTTPException
from starlette.requests import Request

from coordinator.enroll import Peer, Registry
from protocols import identity, requests
from protocols.errors import BadMessage
from protocols.requests import EMPTY_SHA256, Nonces, Signed

log = logging.getLogger("commonweight.auth")

OPERATOR = "operator"
MAX_JSON_BYTES = 256 * 1024


class Auth:
    """Checks signatures of peers and of the operator, and that no request comes twice."""

    def __init__(self, registry: Registry, operator_public: bytes) -> None:
        self._registry = registry
        self._operator = operator_public
        self._nonces = Nonces()

    async def peer(
        self, request: Request, body_sha256: str = EMPTY_SHA256, *, or_awaiting: bool = False
    ) -> Peer:
        """The enrolled peer, or one that awaits approval, that signed this body's digest."""
        signed = self._read(request)
        peer = self._registry.peers.get(signed.sender)
        if peer is None or peer.standing == "removed":
            raise self._refuse(request, 401, f"{signed.sender} is not enrolled")
        self._check(request, signed, peer.sign_public, body_sha256)
        if peer.standing != "enrolled" and not or_awaiting:
            raise self._refuse(request, 403, f"{peer.name} awaits approval")
        return peer

    async def operator(self, request: Request) -> bytes:
        """The body of a request that the operator signed."""
        signed = self._read(request)
        if signed.sender != OPERATOR:
            raise self._refuse(request, 401, f"{signed.sender} is not the operator")
        body = await read_body(request)
        self._check(request, signed, self._operator, hashlib.sha256(body).hexdigest())
        return body

    def _read(self, request: Request) -> Signed:
        try:
            return requests.read(request.method, _path(request), request.headers, time.time())
        except BadMessage as err:
            raise self._refuse(request, 401, err.message) from err

    def _check(self, request: Request, signed: Signed, public: bytes, body_sha256: str) -> None:
        if signed.body_sha256 != body_sha256:
            raise self._refuse(request, 401, "the body is not the one that was signed")
        if not identity.verify(public, signed.signature, signed.message):
            raise self._refuse(request, 401, f"the signature is not that of {signed.sender}")
        if not self._nonces.spend(signed.sender, signed.nonce, time.time()):
            raise self._refuse(request, 401, "the request was sent before")

    @staticmethod
    def _refuse(request: Request, status: int, why: str) -> HTTPException:
        log.warning("refused %s %s: %s", request.method, request.url.path, why)
        return HTTPException(status)


async def read_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """A small body, refused with 413 as soon as it is too long."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HTTPException(413)
    return bytes(body)


def _path(request: Request) -> str:
    query = request.url.query
    return request.url.path + (f"?{query}" if query else "")
