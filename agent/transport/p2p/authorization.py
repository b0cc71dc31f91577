"""Checks whether a request of another peer may be served.

A download token of the coordinator grants one version. An access token is valid while the
coordinator is away: it grants gossip entries and, for a peer, the versions that this agent holds.
Both name the key that must sign the request.
"""

from __future__ import annotations

import logging
import time
from base64 import b64decode
from binascii import Error as BadBase64
from functools import partial

from agent.transport.p2p.gossip import GossipState
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.signed_requests import NonceCache, SignedRequest
from protocols.errors import BadMessage
from protocols.p2p import gossip, swarm

log = logging.getLogger("commonweight.share")


class RequestAuthorizer:
    """Checks requests; a repeated request is refused."""

    def __init__(self, coordinator_public: bytes, gossip_state: GossipState | None = None) -> None:
        self._coordinator_public, self._gossip = coordinator_public, gossip_state
        self._nonces = NonceCache(limit=20_000)

    def authorize(self, method: str, path: str, headers: dict[str, str], digest: str = "") -> str:
        """Returns the digest that the body must have; empty if the request is refused.

        For the `digest` of a version a download token for it is enough.
        """
        now = time.time()
        try:
            holder, key = self._bearer(path, headers, digest, now)
            signed = signed_requests.parse(method, path, headers, now)
        except (BadMessage, BadBase64, ValueError) as err:
            log.debug("refused %s: %s", path, err)
            return ""
        if not self._is_genuine(signed, holder, key, now):
            log.debug("refused %s: not signed by the key that its token names", path)
            return ""
        return signed.body_sha256

    def _bearer(
        self, path: str, headers: dict[str, str], digest: str, now: float
    ) -> tuple[str, bytes]:
        """Returns the peer that must have signed, and its key. Raises BadMessage, ValueError."""
        if gossip.ACCESS_TOKEN_HEADER in headers and self._gossip is not None:
            given = self._gossip.check_pass(
                b64decode(headers[gossip.ACCESS_TOKEN_HEADER], validate=True)
            )
            if given.gossip_only and path != gossip.GOSSIP_PATH:
                raise BadMessage("an observer's token grants gossip entries only")
            return given.holder, given.sign_public
        permit = swarm.verify_download_token(
            b64decode(headers.get(swarm.DOWNLOAD_TOKEN_HEADER, ""), validate=True),
            partial(identity.verify, self._coordinator_public),
            digest,
            now,
        )
        return permit.peer, permit.sign_public

    def _is_genuine(self, signed: SignedRequest, holder: str, key: bytes, now: float) -> bool:
        return (
            signed.sender == holder
            and identity.verify(key, signed.signature, signed.message)
            and self._nonces.use(signed.sender, signed.nonce, now)
        )
