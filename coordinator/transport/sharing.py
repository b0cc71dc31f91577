"""The routes by which agents learn from whom to fetch a version, and say how that went.

POST /cw/v1/plans/{digest}        its pieces, holders near by, a permit   (an enrolled peer)
POST /cw/v1/plans/{digest}/held   I have it; these helped, these failed   (an enrolled peer)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from coordinator.fleet.auth import Auth
from coordinator.fleet.registry import Registry
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.peer_directory import PeerDirectoryRoutes
from coordinator.transport.piece_sources import PieceSources
from coordinator.transport.weights import digest_of
from protocols.messages.envelope import Sign
from protocols.p2p import swarm
from protocols.p2p.swarm import (
    DOWNLOAD_REPORT_PATH,
    DOWNLOAD_TOKEN_LIFETIME_S,
    PIECE_BYTES,
    PLAN_PATH,
    DownloadPlanRequest,
    DownloadReport,
    PieceSource,
)

log = logging.getLogger("commonweight.share")

_MAX_BODY_BYTES = 64 * 1024
_MAX_LISTS = 4

T = TypeVar("T")


class SharingRoutes:
    """Plans for whoever needs a version. `sign` is the coordinator's."""

    def __init__(
        self, store: WeightStore, registry: Registry, sources: PieceSources, sign: Sign
    ) -> None:
        self._store, self._registry, self._sources, self._sign = store, registry, sources, sign
        self.directory_routes = PeerDirectoryRoutes(registry, sign)
        #: Piece lists by version, made when the first agent asks.
        self._lists: dict[str, asyncio.Future[bytes]] = {}

    def remove_peer(self, peer: str) -> None:
        """The peer was removed: nobody is sent to it any more."""
        self._sources.remove_peer(peer)
        self.directory_routes.directory.remove(peer)

    def clear_complaints(self, peer: str) -> None:
        """The peer has opened a new session: complaints about it are over."""
        self._sources.clear_complaints(peer)

    def routes(self, auth: Auth) -> list[tuple[str, str, Callable[..., object]]]:
        """(method, path, endpoint) of the plans, and of the neighbours."""

        async def plan(request: Request) -> Response:
            digest = digest_of(request)
            peer, body = await auth.peer_and_body(request, _MAX_BODY_BYTES)
            asked = _decoded(body, DownloadPlanRequest)
            path = self._store.version_path(digest)
            if not path.exists():
                raise HTTPException(404)
            pieces = await self._pieces(digest, path)
            outside = request.client.host if request.client else ""
            advice = self._sources.plan_fetch(digest, peer.peer, asked, outside, time.monotonic())
            known = self._registry.peers
            permit = swarm.DownloadToken(
                peer=peer.peer,
                sign_public=peer.sign_public,
                digest=digest,
                until=time.time() + DOWNLOAD_TOKEN_LIFETIME_S,
            )
            answer = swarm.DownloadPlan(
                digest=digest,
                nbytes=path.stat().st_size,
                piece_bytes=PIECE_BYTES,
                pieces=pieces,
                sources=tuple(
                    PieceSource(peer=other, address=address, node_public=known[other].node_public)
                    for other, address in advice.sources
                    if other in known and known[other].standing == "enrolled"
                ),
                token=swarm.SIGNED_DOWNLOAD_TOKEN.pack(permit, self._sign),
                use_coordinator=advice.seed,
            )
            return Response(msgspec.json.encode(answer), media_type="application/json")

        async def held(request: Request) -> Response:
            digest = digest_of(request)
            peer, body = await auth.peer_and_body(request, _MAX_BODY_BYTES)
            told = _decoded(body, DownloadReport)
            for other in self._sources.record_complete(digest, peer.peer, told.rates, told.faulty):
                name = self._registry.peers[other].name if other in self._registry.peers else other
                log.warning("%s found %s of no help with a version", peer.name, name)
            return Response(status_code=204)

        plans = [("POST", PLAN_PATH, plan), ("POST", DOWNLOAD_REPORT_PATH, held)]
        return [*plans, *self.directory_routes.routes(auth)]

    async def _pieces(self, digest: str, path: Path) -> bytes:
        """The version's piece list, made once however many ask."""
        if digest not in self._lists:
            while len(self._lists) >= _MAX_LISTS:
                del self._lists[next(iter(self._lists))]
            self._lists[digest] = asyncio.ensure_future(asyncio.to_thread(_hashed, path))
        try:
            return await asyncio.shield(self._lists[digest])
        except OSError as err:  # dropped meanwhile
            self._lists.pop(digest, None)
            raise HTTPException(404) from err


def _hashed(path: Path) -> bytes:
    with path.open("rb") as file:
        return swarm.piece_digests(iter(lambda: file.read(PIECE_BYTES), b""))


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise HTTPException(400) from err
