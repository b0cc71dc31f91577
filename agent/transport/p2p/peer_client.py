"""Requests to another peer while the coordinator is away. Blocking, one request at a time.

The peer is not trusted: entries are signed by their authors, the coordinator's signature proves a
version, and a digest proves its bytes. Responses that are too slow are aborted.
"""

from __future__ import annotations

import hashlib
import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent.home.credentials import Credentials
from agent.transport.p2p.peer_connection import PeerConnection
from agent.transport.version_proofs import MAX_PROOF_BYTES
from protocols.errors import BadWeights, Unreachable
from protocols.local.atomic_files import write_all
from protocols.messages.decoding import MALFORMED
from protocols.p2p import gossip
from protocols.p2p.gossip import GossipBatch, Neighbor

_TIMEOUT_S = 10.0
#: A round of gossip waits for its slowest peer, so a silent one costs no more than this.
STALL_S = 3.0
#: A download below this rate is aborted, and another peer is used.
_MIN_BYTES_PER_S = 64 * 1024
_MAX_PROOF_BYTES = 2 * MAX_PROOF_BYTES  # base64 adds a third
_READ_BYTES = 1 << 20


class PeerClient:
    """A client for one peer. Every method raises Unreachable if the peer fails."""

    def __init__(self, peer: Neighbor, access_token: bytes, credentials: Credentials) -> None:
        self._name = peer.name
        self._connection = PeerConnection(
            peer,
            credentials,
            gossip.ACCESS_TOKEN_HEADER,
            access_token,
            stall_s=STALL_S,
        )

    def exchange_gossip(self, batch: GossipBatch) -> GossipBatch:
        """Sends gossip entries and returns those of the peer."""
        body = self._fetch(
            "POST", gossip.GOSSIP_PATH, gossip.MAX_BATCH_BYTES, msgspec.msgpack.encode(batch)
        )
        try:
            return msgspec.msgpack.decode(body, type=GossipBatch)
        except MALFORMED as err:
            raise Unreachable(f"{self._name} sent an invalid response: {err}") from err

    def proof(self, digest: str) -> bytes:
        """Downloads the proof of a version. It is not verified yet."""
        return self._fetch("GET", gossip.PROOF_PATH.format(digest=digest), _MAX_PROOF_BYTES)

    def version(
        self, digest: str, nbytes: int, target: Path, received: Callable[[int], None]
    ) -> None:
        """Downloads a version into `target`. Raises BadWeights, OSError (our disk).

        Calls `received(n)` after each `n` bytes.
        """
        sha, size = hashlib.sha256(), 0
        within_s = _TIMEOUT_S + nbytes / _MIN_BYTES_PER_S
        with (
            target.open("wb", buffering=0) as file,
            self._request("GET", f"/cw/v1/weights/{digest}", within_s) as response,
        ):
            while size < nbytes:
                data = self._connection.read(response, min(_READ_BYTES, nbytes - size))
                received(len(data))
                sha.update(data)
                write_all(file, memoryview(data))
                size += len(data)
        if sha.hexdigest() != digest:
            raise BadWeights(f"{self._name} sent bytes that do not match the version's digest")

    def _fetch(self, method: str, path: str, limit: int, body: bytes = b"") -> bytes:
        """Reads a whole response. A body without a length or above the limit is not read."""
        with self._request(method, path, _TIMEOUT_S, body) as response:
            if response.length is None or response.length > limit:
                raise Unreachable(
                    f"{self._name} sent a response without a length, or above the limit"
                )
            return self._connection.read(response)

    @contextmanager
    def _request(
        self, method: str, path: str, within_s: float, body: bytes = b""
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request on its own connection; yields the response if its status is 200."""
        try:
            with self._connection.exchange(method, path, within_s, body) as response:
                if response.status != 200:
                    raise Unreachable(f"{self._name} answers {response.status}")
                yield response
        finally:
            self._connection.close()
