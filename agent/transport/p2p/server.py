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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h11
import msgspec

from agent.transport.bandwidth import RateLimit
from agent.transport.p2p.authorization import RequestAuthorizer
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.piece_store import PieceStore, pieces_of
from protocols.enrollment.signed_requests import SENDER
from protocols.messages.decoding import MALFORMED
from protocols.p2p.gossip import GOSSIP_PATH, MAX_BATCH_BYTES, GossipBatch
from protocols.p2p.peer_addresses import plain_ip
from protocols.p2p.swarm import PIECE_BYTES

log = logging.getLogger("commonweight.share")

MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS = 32, 4
_HANDSHAKE_S = 5.0
#: The time limit for a request head, from the end of the previous response.
_HEAD_S = 10.0
#: Time limits for a client that does not read, and for a piece that does not arrive.
_READER_S, _PIECE_S = 15.0, 4.0
_MAX_HEAD_BYTES = 16 * 1024
_VERSION = re.compile(r"/cw/v1/weights/([0-9a-f]{64})\Z")
_PROOF = re.compile(r"/cw/v1/proofs/([0-9a-f]{64})\Z")
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})\Z")


class _Refused(Exception):
    """The request is answered with this HTTP status and no body."""

    def __init__(self, status: int) -> None:
        self.status = status


class _HttpConnection:
    """HTTP/1.1 to one client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        #: The client's IP address.
        self.host = plain_ip(writer.get_extra_info("peername", ("",))[0])
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)

    def start_next(self) -> bool:
        """Prepares for the next request; False if the connection cannot be reused."""
        reusable = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        if reusable:
            self._http.start_next_cycle()
        return reusable

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_MAX_HEAD_BYTES))
        return event

    async def head(self) -> tuple[str, str, dict[str, str]]:
        """Returns method, path and headers of the next request. Raises EOFError at the end."""
        request = await self._event()
        if not isinstance(request, h11.Request):
            raise EOFError
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
        return request.method.decode(), request.target.decode("ascii", "replace"), headers

    async def body(self) -> bytes | None:
        """Reads a request's body; None if it is too long or truncated."""
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > MAX_BATCH_BYTES:
                return None
        return bytes(body) if isinstance(event, h11.EndOfMessage) else None

    async def respond(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Sends a whole response."""
        await self.start(status, len(body), **headers)
        await self.write(body)
        await self.end()

    async def start(self, status: int, nbytes: int, **headers: str) -> None:
        """Sends the head of a response with a body of `nbytes`."""
        fields = {"content-length": str(nbytes), **headers}
        await self._send(h11.Response(status_code=status, headers=list(fields.items())))

    async def write(self, data: bytes) -> None:
        """Sends a part of the response's body."""
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        """Ends the response."""
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        if data := self._http.send(event):
            self._writer.write(data)
            async with asyncio.timeout(_READER_S):
                await self._writer.drain()


class PeerServer:
    """A listening socket over a piece store. `bytes_per_s`: 0 for no limit."""

    def __init__(
        self,
        store: PieceStore,
        authorizer: RequestAuthorizer,
        bytes_per_s: float,
        gossip_state: GossipState | None,
        certificate: Path,
        key: Path,
    ) -> None:
        self._store, self._gossip = store, gossip_state
        self._authorizer, self._bytes_per_s = authorizer, bytes_per_s
        self._rate_limit = RateLimit()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls.load_cert_chain(certificate, key)
        #: The task of each connection, and its IP address.
        self._connections: dict[asyncio.Task[None], str] = {}
        self._listener: socket.socket | None = None
        self.bytes_sent = 0
        #: Asked before each piece of a version, with its bytes.
        self.may_send: Callable[[int], bool] = lambda nbytes: True

    def listen(self, host: str, port: int) -> int:
        """Binds and returns the port. Raises OSError."""
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self._listener.setblocking(False)
        bound: int = self._listener.getsockname()[1]
        return bound

    async def serve(self) -> None:
        """Accepts connections until cancelled, then ends all."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            while True:
                accepted, (address, *_) = await loop.sock_accept(self._listener)
                addresses = list(self._connections.values())
                # Count from the first packet: an unfinished handshake is a connection, too.
                if (
                    len(addresses) >= MAX_CONNECTIONS
                    or addresses.count(address) >= MAX_CONNECTIONS_PER_ADDRESS
                ):
                    accepted.close()
                    continue
                task = asyncio.create_task(self._serve(accepted), name=f"peer {address}")
                self._connections[task] = address
                task.add_done_callback(self._connections.pop)
        finally:
            self._listener.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, accepted: socket.socket) -> None:
        """Answers the requests of one connection."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls, ssl_handshake_timeout=_HANDSHAKE_S
            )
        except (OSError, TimeoutError):
            accepted.close()
            return
        client = _HttpConnection(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        try:
            await self._answer(client)
            while client.start_next():
                await self._answer(client)
        except _Refused as err:
            with suppress(OSError, TimeoutError, h11.ProtocolError):
                await client.respond(err.status, connection="close")
        except (OSError, TimeoutError, h11.ProtocolError, EOFError):
            pass  # the client retries, or asks another peer
        finally:
            transport.abort()

    async def _answer(self, client: _HttpConnection) -> None:
        async with asyncio.timeout(_HEAD_S):
            method, path, headers = await client.head()
            try:
                digest, body_sha256 = self._authorize(method, path, headers)
            except _Refused:
                await client.body()  # unread bytes would reset the connection
                raise
            body = await client.body()
        if body is None or hashlib.sha256(body).hexdigest() != body_sha256:
            raise _Refused(401)
        if _VERSION.match(path):
            await self._send_version(client, digest, headers)
            return
        answer = (
            self._proof(digest)
            if digest
            else self._exchange_gossip(body, headers[SENDER], client.host)
        )
        if answer is None:
            raise _Refused(404)
        await client.respond(200, answer)

    def _authorize(self, method: str, path: str, headers: dict[str, str]) -> tuple[str, str]:
        """Returns the requested digest (empty for gossip) and the body's, if authorized."""
        version, proof = _VERSION.match(path), _PROOF.match(path)
        digest = ""
        if method == "GET" and (match := version or proof):
            digest = match[1]
        elif (method, path) != ("POST", GOSSIP_PATH):
            raise _Refused(404)
        body_sha256 = self._authorizer.authorize(method, path, headers, digest if version else "")
        if not body_sha256:
            raise _Refused(401)
        return digest, body_sha256

    def _exchange_gossip(self, body: bytes, sender: str, host: str) -> bytes | None:
        """Takes the entries in `body` and returns ours. `sender` has signed the request."""
        if self._gossip is None:
            return None
        try:
            self._gossip.receive(msgspec.msgpack.decode(body, type=GossipBatch), sender, host)
        except MALFORMED:
            return None
        return msgspec.msgpack.encode(self._gossip.outgoing())

    def _proof(self, digest: str) -> bytes | None:
        return self._gossip.heads.proof(digest) if self._gossip is not None else None

    async def _send_version(
        self, client: _HttpConnection, digest: str, headers: dict[str, str]
    ) -> None:
        """Sends a version or a range of it. A response that ends early closes the connection."""
        version = await self._store.find(digest, _PIECE_S)
        if version is None:
            raise _Refused(503)
        start, stop = _range(headers, version.nbytes)
        if not await version.wait(start // PIECE_BYTES, _PIECE_S):
            raise _Refused(503)
        if "range" in headers:
            content_range = f"bytes {start}-{stop - 1}/{version.nbytes}"
            await client.start(206, stop - start, **{"content-range": content_range})
        else:
            await client.start(200, stop - start)
        for piece in pieces_of(start, stop):
            if not await version.wait(piece, _PIECE_S):
                return  # the client keeps what it has received
            first, last = piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES
            data = version.read(max(start, first), min(stop, last))
            if not self.may_send(len(data)):
                return
            await asyncio.sleep(self._rate_limit.reserve(len(data), self._bytes_per_s))
            await client.write(data)
            self.bytes_sent += len(data)
        await client.end()


def _range(headers: dict[str, str], nbytes: int) -> tuple[int, int]:
    """Returns the requested bytes `start` to `stop`."""
    match = _RANGE.match(headers.get("range", "bytes=0-"))
    if match is None:
        raise _Refused(416)
    start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else nbytes, nbytes)
    if start >= stop:
        raise _Refused(416)
    return start, stop
