"""Serves versions and gossip to other peers if the owner allows it. Read only, over TLS.

    GET  /cw/v1/weights/{digest}   whole or a range; 503 if its first piece is not present soon
    GET  /cw/v1/proofs/{digest}    the coordinator's proof that it is a version
    POST /cw/v1/words              gossip entries for gossip entries

A request carries the coordinator's download token for that version, or an access token, and is
signed with the key that the token names. The TLS certificate holds this machine's node key, which
the requester knows. Others get a refusal without details. Connections, times and bandwidth are
bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import socket
import ssl
import time
from collections import Counter
from functools import partial
from pathlib import Path

import h11
import msgspec

from agent.transport.p2p.authorization import RequestAuthorizer
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.piece_store import PieceStore, pieces_of
from protocols.enrollment import identity
from protocols.enrollment.identity import NodeKey
from protocols.local.atomic_files import write_private
from protocols.p2p.gossip import GOSSIP_PATH, MAX_BATCH_BYTES, GossipBatch
from protocols.p2p.swarm import PIECE_BYTES

log = logging.getLogger("commonweight.share")

MOST_CONNECTIONS, MOST_PER_ADDRESS = 32, 4
_HANDSHAKE_S = 5.0
#: The time limit for a request head, from the end of the previous response.
_HEAD_S = 10.0
#: Time limits for a client that does not read, and for a piece that does not arrive.
_READER_S, _PIECE_S = 15.0, 4.0
_MOST_HEAD_BYTES = 16 * 1024
VERSION_PATH = "/cw/v1/weights/{digest}"
_VERSION = re.compile(r"/cw/v1/weights/([0-9a-f]{64})\Z")
_PROOF = re.compile(r"/cw/v1/proofs/([0-9a-f]{64})\Z")
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})\Z")


class Pace:
    """A rate limit in bytes per second over all connections; 0 means no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at = 0.0

    async def take(self, nbytes: int) -> None:
        """Waits until `nbytes` may be sent."""
        if self._rate:
            now = time.monotonic()
            at = max(now, self._free_at)
            self._free_at = at + nbytes / self._rate
            await asyncio.sleep(at - now)


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class PeerServer:
    """A listening socket over a piece store. `close` ends it and every connection."""

    def __init__(
        self,
        shelf: PieceStore,
        *,
        coordinator_public: bytes,
        certificate: Path,
        key: Path,
        bytes_per_s: float = 0.0,
        gossip_state: GossipState | None = None,
    ) -> None:
        self._shelf, self._gossip = shelf, gossip_state
        self._entry = RequestAuthorizer(coordinator_public, gossip_state)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls.load_cert_chain(certificate, key)
        self._pace = Pace(bytes_per_s)
        self._held: Counter[str] = Counter()
        self._serving: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self.bytes_sent = 0

    def listen(self, host: str, port: int) -> int:
        """Binds and returns the port. Raises OSError."""
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self._listener.setblocking(False)
        bound: int = self._listener.getsockname()[1]
        return bound

    async def serve(self) -> None:
        """Accepts connections until cancelled."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            while True:
                accepted, address = await loop.sock_accept(self._listener)
                who = str(address[0])
                # Count from the first packet: an unfinished handshake is a connection, too.
                if self._held.total() >= MOST_CONNECTIONS or self._held[who] >= MOST_PER_ADDRESS:
                    accepted.close()
                    continue
                self._held[who] += 1
                task = asyncio.create_task(self._connection(accepted), name=f"peer {who}")
                self._serving.add(task)
                task.add_done_callback(partial(self._left, who))
        finally:
            self._listener.close()
            for task in tuple(self._serving):
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

    def _left(self, who: str, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]

    async def _connection(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_MOST_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls, ssl_handshake_timeout=_HANDSHAKE_S
            )
        except (OSError, TimeoutError):
            accepted.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD_BYTES)
        try:
            while await self._request(http, reader, writer):
                http.start_next_cycle()
        except (OSError, TimeoutError, h11.ProtocolError, EOFError):
            pass  # the client retries, or asks another peer
        finally:
            transport.abort()

    async def _request(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answers one request; True if the connection can be reused."""
        async with asyncio.timeout(_HEAD_S):
            request = await _event(http, reader)
            if not isinstance(request, h11.Request):
                return False
            path = request.target.decode("ascii", "replace")
            headers = {
                name.decode("ascii"): value.decode("latin-1") for name, value in request.headers
            }
            try:
                digest, announced = self._admitted(request.method.decode(), path, headers)
            except _Refused as err:
                await _body(http, reader)  # unread bytes would reset the connection
                return await self._refuse(http, writer, err.status)
            body = await _body(http, reader)
        if body is None or hashlib.sha256(body).hexdigest() != announced:
            return await self._refuse(http, writer, 401)
        if digest and path == VERSION_PATH.format(digest=digest):
            return await self._send_version(http, writer, digest, headers)
        answer = self._say(body) if not digest else self._proof(digest)
        if answer is None:
            return await self._refuse(http, writer, 404)
        head = h11.Response(status_code=200, headers=[("content-length", str(len(answer)))])
        await self._send(writer, http.send(head))
        await self._send(writer, http.send(h11.Data(data=answer)))
        await self._send(writer, http.send(h11.EndOfMessage()))
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    def _admitted(self, method: str, path: str, headers: dict[str, str]) -> tuple[str, str]:
        """Returns the requested version (empty for gossip) and the body's digest, if authorized."""
        version, proof = _VERSION.match(path), _PROOF.match(path)
        digest = ""
        if method == "GET" and (found := version or proof):
            digest = found[1]
        elif (method, path) != ("POST", GOSSIP_PATH):
            raise _Refused(404)
        announced = self._entry.authorize(method, path, headers, digest if version else "")
        if not announced:
            raise _Refused(401)
        return digest, announced

    def _say(self, body: bytes) -> bytes | None:
        """Takes the entries in `body` and returns ours."""
        if self._gossip is None:
            return None
        try:
            self._gossip.receive(msgspec.msgpack.decode(body, type=GossipBatch))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return msgspec.msgpack.encode(self._gossip.outgoing())

    def _proof(self, digest: str) -> bytes | None:
        return self._gossip.heads.proof(digest) if self._gossip is not None else None

    async def _refuse(
        self, http: h11.Connection, writer: asyncio.StreamWriter, status: int
    ) -> bool:
        bare = [("content-length", "0"), ("connection", "close")]
        await self._send(writer, http.send(h11.Response(status_code=status, headers=bare)))
        await self._send(writer, http.send(h11.EndOfMessage()))
        return False

    async def _send_version(
        self,
        http: h11.Connection,
        writer: asyncio.StreamWriter,
        digest: str,
        headers: dict[str, str],
    ) -> bool:
        """Sends a version or a range of it; True if the connection can be reused."""
        book = await self._shelf.find(digest, _PIECE_S)
        if book is None:
            return await self._refuse(http, writer, 503)
        try:
            start, stop, partial = _range(headers, book.nbytes)
        except _Refused as err:
            return await self._refuse(http, writer, err.status)
        if not await book.wait(start // PIECE_BYTES, _PIECE_S):
            return await self._refuse(http, writer, 503)
        described = [("content-length", str(stop - start))]
        if partial:
            described.append(("content-range", f"bytes {start}-{stop - 1}/{book.nbytes}"))
        head = h11.Response(status_code=206 if partial else 200, headers=described)
        await self._send(writer, http.send(head))
        for piece in pieces_of(start, stop):
            if not await book.wait(piece, _PIECE_S):
                return False  # close: the client keeps what it has received
            first, last = piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES
            data = book.read(max(start, first), min(stop, last))
            await self._pace.take(len(data))
            await self._send(writer, http.send(h11.Data(data=data)))
            self.bytes_sent += len(data)
        await self._send(writer, http.send(h11.EndOfMessage()))
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    async def _send(self, writer: asyncio.StreamWriter, data: bytes | None) -> None:
        if data:
            writer.write(data)
            async with asyncio.timeout(_READER_S):
                await writer.drain()


def _range(headers: dict[str, str], nbytes: int) -> tuple[int, int, bool]:
    """Returns the requested bytes `start` to `stop`, and whether that is a range."""
    if "range" not in headers:
        return 0, nbytes, False
    asked = _RANGE.match(headers["range"])
    if asked is None:
        raise _Refused(416)
    start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else nbytes, nbytes)
    if start >= stop:
        raise _Refused(416)
    return start, stop, True


async def _event(http: h11.Connection, reader: asyncio.StreamReader) -> object:
    """Returns the next complete event of the client."""
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(_MOST_HEAD_BYTES))
    return event


async def _body(http: h11.Connection, reader: asyncio.StreamReader) -> bytes | None:
    """Reads a request's body; None if it is too long or truncated."""
    body = bytearray()
    while isinstance(event := await _event(http, reader), h11.Data):
        body += event.data
        if len(body) > MAX_BATCH_BYTES:
            return None
    return bytes(body) if isinstance(event, h11.EndOfMessage) else None


def certify(path: Path, key: NodeKey, peer: str) -> None:
    """Writes the TLS certificate of this machine's node key."""
    write_private(path, identity.new_node_tls(key, peer))
