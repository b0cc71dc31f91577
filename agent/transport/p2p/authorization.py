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
from protocols.enrollment.signed_requests import NonceCache
from protocols.errors import BadMessage
from protocols.p2p.gossip import ACCESS_TOKEN_HEADER, GOSSIP_PATH, AccessToken
from protocols.p2p.swarm import DOWNLOAD_TOKEN_HEADER, DownloadToken, verify_download_token

log = logging.getLogger("commonweight.share")


class RequestAuthorizer:
    """Checks requests to the peer `own`; a repeated request is refused."""

    def __init__(
        self, coordinator_public: bytes, own: str, gossip_state: GossipState | None = None
    ) -> None:
        self._coordinator_public, self._own = coordinator_public, own
        self._gossip = gossip_state
        self._nonces = NonceCache(limit=20_000)

    def authorize(self, method: str, path: str, headers: dict[str, str], digest: str = "") -> str:
        """Returns the digest that the body must have; empty if the request is refused.

        For the `digest` of a version a download token for it is enough.
        """
        now = time.time()
        try:
            token = self._token(path, headers, digest, now)
            peer = token.peer if isinstance(token, DownloadToken) else token.holder
            request = signed_requests.parse(method, path, headers, now, self._own)
            if not request.receiver and token.signs > 1:  # another peer may have passed it on
                raise BadMessage("it names no receiver")
            if request.sender != peer or not identity.verify(
                token.sign_public, request.signature, request.message
            ):
                raise BadMessage("not signed by the key that its token names")
            if not self._nonces.use(request.sender, request.nonce, now):
                raise BadMessage("a repeated request")
        except (BadMessage, BadBase64, ValueError) as err:
            log.debug("refused %s: %s", path, err)
            return ""
        return request.body_sha256

    def _token(
        self, path: str, headers: dict[str, str], digest: str, now: float
    ) -> AccessToken | DownloadToken:
        """Returns the verified token of a request. Raises BadMessage, ValueError."""
        if ACCESS_TOKEN_HEADER in headers and self._gossip is not None:
            token = self._gossip.verify_token(
                b64decode(headers[ACCESS_TOKEN_HEADER], validate=True)
            )
            if token.gossip_only and path != GOSSIP_PATH:
                raise BadMessage("an observer's token grants gossip entries only")
            return token
        data = b64decode(headers.get(DOWNLOAD_TOKEN_HEADER, ""), validate=True)
        verify = partial(identity.verify, self._coordinator_public)
        return verify_download_token(data, verify, digest, now)
