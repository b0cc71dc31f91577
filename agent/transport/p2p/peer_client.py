"""What one peer asks another while the coordinator is away; blocking, one request after the other.

Nothing that comes is believed: a word is signed by its speaker, a version proved by the coordinator
and its bytes by their digest. A peer that answers too slowly is broken off.
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
#: A version comes at least so fast, or somebody else is asked.
_MIN_BYTES_PER_S = 64 * 1024
_MAX_PROOF_BYTES = 1 << 20
_READ_BYTES = 1 << 20

#: `sign(method, path, body_sha256)`: the headers of a request in this agent's name.
SignRequest = Callable[[str, str, str], dict[str, str]]


class PeerClient:
    """A conversation with one peer. Every method raises Unreachable when it is of no use."""

    def __init__(self, partner: Neighbor, pass_: bytes, sign: SignRequest) -> None:
        self._partner, self._pass, self._sign = partner, pass_, sign
        self._name = partner.name

    def words(self, told: GossipBatch) -> GossipBatch:
        """Tell words, and hear those of the other."""
        body = msgspec.msgpack.encode(told)
        with self._asked("POST", GOSSIP_PATH, body) as answer:
            heard = self._whole(answer, MAX_BATCH_BYTES)
        try:
            return msgspec.msgpack.decode(heard, type=GossipBatch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise Unreachable(f"{self._name} tells nonsense: {err}") from err

    def proof(self, digest: str) -> bytes:
        """What proves a version, not looked at yet."""
        with self._asked("GET", PROOF_PATH.format(digest=digest)) as answer:
            return self._whole(answer, _MAX_PROOF_BYTES)

    def version(
        self, digest: str, nbytes: int, target: Path, received: Callable[[int], None]
    ) -> None:
        """Bring a version into `target`. Raises BadWeights, OSError (our disk).

        `received(n)` is told of bytes as they come.
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
            raise BadWeights(f"{self._name} has sent other bytes than those of the version")

    def _read(self, answer: http.client.HTTPResponse, most: int) -> bytes:
        try:
            data = answer.read1(most)
        except (OSError, http.client.HTTPException) as err:
            raise Unreachable(f"{self._name} broke off: {err}") from err
        if not data:
            raise Unreachable(f"{self._name} broke off")
        return data

    def _whole(self, answer: http.client.HTTPResponse, most: int) -> bytes:
        """All of an answer. A body without a length, or with too great a one, is not read."""
        if answer.length is None or answer.length > most:
            raise Unreachable(f"{self._name} answers at no known length")
        data = bytearray()
        while answer.length:
            data += self._read(answer, answer.length)
        return bytes(data)

    @contextmanager
    def _asked(
        self, method: str, path: str, body: bytes = b"", within_s: float = _TIMEOUT_S
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request, on a connection of its own."""
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
