"""Requests to another peer while the coordinator is away. Blocking, one request at a time.

The peer is not trusted: entries are signed by their authors, the coordinator's signature proves a
version, and a digest proves its bytes. Responses that are too slow are aborted.
"""

from __future__ import annotations

import hashlib
import http.client
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent.transport.p2p.pinned_tls import PinnedConnection
from protocols.errors import BadWeights, Refused, Unreachable
from protocols.local.atomic_files import write_all
from protocols.p2p import gossip
from protocols.p2p.gossip import GOSSIP_PATH, MAX_BATCH_BYTES, PROOF_PATH, GossipBatch, Neighbor

_TIMEOUT_S = 10.0
#: A download below this rate is aborted, and another peer is used.
_MIN_BYTES_PER_S = 64 * 1024
_MAX_PROOF_BYTES = 1 << 20
_READ_BYTES = 1 << 20

#: `sign(method, path, body_sha256)` returns the headers of a signed request.
SignRequest = Callable[[str, str, str], dict[str, str]]


class PeerClient:
    """A client for one peer. Every method raises Unreachable if the peer fails."""

    def __init__(self, partner: Neighbor, pass_: bytes, sign: SignRequest) -> None:
        self._partner, self._pass, self._sign = partner, pass_, sign
        self._name = partner.name

    def words(self, told: GossipBatch) -> GossipBatch:
        """Sends gossip entries and returns those of the peer."""
        body = msgspec.msgpack.encode(told)
        with self._asked("POST", GOSSIP_PATH, body) as answer:
            heard = self._whole(answer, MAX_BATCH_BYTES)
        try:
            return msgspec.msgpack.decode(heard, type=GossipBatch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise Unreachable(f"{self._name} sent an invalid response: {err}") from err

    def proof(self, digest: str) -> bytes:
        """Downloads the proof of a version. It is not verified yet."""
        with self._asked("GET", PROOF_PATH.format(digest=digest)) as answer:
            return self._whole(answer, _MAX_PROOF_BYTES)

    def version(
        self, digest: str, nbytes: int, target: Path, received: Callable[[int], None]
    ) -> None:
        """Downloads a version into `target`. Raises BadWeights, OSError (our disk).

        Calls `received(n)` after each `n` bytes.
        """
        sha, have = hashlib.sha256(), 0
        within_s = _TIMEOUT_S + nbytes / _MIN_BYTES_PER_S
        with (
            target.open("wb", buffering=0) as file,
            self._asked("GET", f"/cw/v1/weights/{digest}", within_s=within_s) as answer,
        ):
            while have < nbytes:
                data = self._read(answer, min(_READ_BYTES, nbytes - have))
                received(len(data))
                sha.update(data)
                write_all(file, memoryview(data))
                have += len(data)
        if sha.hexdigest() != digest:
            raise BadWeights(f"{self._name} sent bytes that do not match the version's digest")

    def _read(self, answer: http.client.HTTPResponse, most: int) -> bytes:
        try:
            data = answer.read1(most)
        except (OSError, http.client.HTTPException) as err:
            raise Unreachable(f"{self._name} closed the connection: {err}") from err
        if not data:
            raise Unreachable(f"{self._name} closed the connection")
        return data

    def _whole(self, answer: http.client.HTTPResponse, most: int) -> bytes:
        """Reads a whole response. A body without a length or above the limit is not read."""
        if answer.length is None or answer.length > most:
            raise Unreachable(f"{self._name} sent a response without a length, or above the limit")
        data = bytearray()
        while answer.length:
            data += self._read(answer, answer.length)
        return bytes(data)

    @contextmanager
    def _asked(
        self, method: str, path: str, body: bytes = b"", within_s: float = _TIMEOUT_S
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request on its own connection and yields the response."""
        headers = self._sign(method, path, hashlib.sha256(body).hexdigest())
        headers[gossip.ACCESS_TOKEN_HEADER] = b64encode(self._pass).decode()
        connection = PinnedConnection(self._partner.address, self._partner.node_public)
        overdue = threading.Timer(within_s, connection.end)
        overdue.daemon = True
        overdue.start()
        try:
            try:
                connection.request(method, path, body=body or None, headers=headers)
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException, Refused) as err:
                raise Unreachable(f"{self._name} does not answer: {err}") from err
            if answer.status != 200:
                raise Unreachable(f"{self._name} answers {answer.status}")
            yield answer
        finally:
            overdue.cancel()
            connection.close()
