"""The routes by which peers find each other.

    POST /cw/v1/plans/{digest}        pieces, sources and a download token    (an enrolled peer)
    POST /cw/v1/plans/{digest}/held   report a complete download              (an enrolled peer)
    POST /cw/v1/neighbours            an access token, and peers near by      (an enrolled peer)
    GET  /cw/v1/neighbours            an access token, and all peers          (operator, observer)

The tokens let a peer ask others, also while the coordinator is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.fleet.auth import Auth, json_response
from coordinator.fleet.members import Peer
from coordinator.fleet.registry import Registry
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.peer_directory import MAX_LISTED, Location, PeerDirectory
from coordinator.transport.piece_sources import PieceSources
from coordinator.transport.weights import digest_of
from protocols.messages.envelope import MAX_SOURCES, Sign
from protocols.p2p import gossip, swarm
from protocols.p2p.gossip import NEIGHBORS_PATH, Neighbor, NeighborsResponse
from protocols.p2p.peer_addresses import plain_ip
from protocols.p2p.swarm import DownloadPlanRequest

log = logging.getLogger("commonweight.share")

_MAX_BODY_BYTES = 64 * 1024
_MAX_LISTS = 4


class SharingRoutes:
    """Handlers of the routes. `sign` signs as the coordinator."""

    def __init__(
        self, store: WeightStore, registry: Registry, sources: PieceSources, sign: Sign
    ) -> None:
        self._store, self._registry, self._sources, self._sign = store, registry, sources, sign
        self._directory = PeerDirectory()
        #: By peer: the last reported address that was not passed on.
        self._warned: dict[str, str] = {}
        #: By peer: the peers from which it fetched its last version, with bytes/s.
        self._fetched_from: dict[str, dict[str, float]] = {}
        #: Called with a peer that has fetched a version from other peers.
        self.on_fetched: Callable[[str], None] = lambda peer: None
        #: Piece digests by version, computed at the first request.
        self._lists: dict[str, asyncio.Future[bytes]] = {}

    def fetched_from(self, peer: str) -> dict[str, float]:
        """The peers from which `peer` fetched its last version, with bytes/s."""
        return self._fetched_from.get(peer, {})

    def _note_fetched(self, peer: str, rates: Mapping[str, float]) -> None:
        known = {name: rate for name, rate in rates.items() if name in self._registry.peers}
        fastest = sorted(known.items(), key=lambda item: -item[1])[:MAX_SOURCES]
        before, self._fetched_from[peer] = self.fetched_from(peer), dict(fastest)
        if before or fastest:
            self.on_fetched(peer)

    def remove_peer(self, peer: str) -> None:
        """Send no one to this peer any more."""
        self._sources.remove_peer(peer)
        self._warned.pop(peer, None)
        self._fetched_from.pop(peer, None)
        self._directory.remove(peer)

    def clear_complaints(self, peer: str) -> None:
        """Use this peer as a source again: it has opened a new session."""
        self._sources.clear_complaints(peer)

    def routes(self, auth: Auth) -> list[Route]:
        async def plan(request: Request) -> Response:
            digest = digest_of(request)
            peer, body = await auth.peer_and_struct(request, DownloadPlanRequest, _MAX_BODY_BYTES)
            self._warn_of_address(peer, body, _outside(request))
            path = self._store.version_path(digest)
            if not path.exists():
                raise HTTPException(404)
            pieces = await self._pieces(digest, path)
            fetch = self._sources.plan_fetch(
                digest, peer.peer, body, _outside(request), time.monotonic()
            )
            token = swarm.DownloadToken(
                peer=peer.peer,
                sign_public=peer.sign_public,
                digest=digest,
                signs=auth.signature_format(peer.peer),
                until=time.time() + swarm.DOWNLOAD_TOKEN_LIFETIME_S,
            )
            return json_response(
                swarm.DownloadPlan(
                    digest=digest,
                    nbytes=path.stat().st_size,
                    piece_bytes=swarm.PIECE_BYTES,
                    pieces=pieces,
                    sources=tuple(
                        swarm.PieceSource(
                            peer=p.peer,
                            address=address,
                            node_public=p.node_public,
                            signs=auth.signature_format(p.peer),
                        )
                        for p, address in self._enrolled(fetch.sources)
                    ),
                    token=swarm.SIGNED_DOWNLOAD_TOKEN.pack(token, self._sign),
                    use_coordinator=fetch.seed,
                )
            )

        async def report(request: Request) -> Response:
            digest = digest_of(request)
            peer, body = await auth.peer_and_struct(request, swarm.DownloadReport, _MAX_BODY_BYTES)
            for other in self._sources.record_complete(digest, peer.peer, body.rates, body.faulty):
                known = self._registry.peers.get(other)
                name = known.name if known else other
                log.warning("%s reports %s as a faulty source of a version", peer.name, name)
            self._note_fetched(peer.peer, body.rates)
            return Response(status_code=204)

        async def neighbors(request: Request) -> Response:
            peer, body = await auth.peer_and_struct(request, DownloadPlanRequest, _MAX_BODY_BYTES)
            self._warn_of_address(peer, body, _outside(request))
            self._directory.update(peer.peer, body, _outside(request))
            nearby = self._directory.nearby(peer.peer, body, _outside(request))
            return self._neighbors(auth, peer.peer, peer.sign_public, nearby, gossip_only=False)

        async def all_peers(request: Request) -> Response:
            await auth.operator(request, or_observer=True)
            holder, public = auth.operator_key(request)
            everybody = self._directory.all()
            return self._neighbors(auth, holder, public, everybody, gossip_only=True)

        return [
            Route(swarm.PLAN_PATH, plan, methods=["POST"]),
            Route(swarm.DOWNLOAD_REPORT_PATH, report, methods=["POST"]),
            Route(NEIGHBORS_PATH, neighbors, methods=["POST"]),
            Route(NEIGHBORS_PATH, all_peers),
        ]

    def _warn_of_address(self, peer: Peer, reported: DownloadPlanRequest, outside: str) -> None:
        """Log once per peer and address that its reported address is not passed on."""
        reason = Location(reported, outside).refusal
        if reason and self._warned.get(peer.peer) != reported.address:
            self._warned[peer.peer] = reported.address
            log.warning(
                "%s reports %s as its address for other peers: %s. No peer is sent there; its "
                "owner can turn sharing off: commonweight-agent policy set share off",
                *(peer.name, reported.address, reason),
            )

    def _enrolled(self, found: Iterable[tuple[str, str]]) -> Iterator[tuple[Peer, str]]:
        known = self._registry.peers
        for peer, address in found:
            if peer in known and known[peer].standing == "enrolled":
                yield known[peer], address

    def _neighbors(
        self,
        auth: Auth,
        holder: str,
        public: bytes,
        found: list[tuple[str, str]],
        *,
        gossip_only: bool,
    ) -> Response:
        token = gossip.AccessToken(
            holder=holder,
            sign_public=public,
            until=time.time() + gossip.ACCESS_TOKEN_LIFETIME_S,
            gossip_only=gossip_only,
            signs=auth.signature_format(holder),
        )
        removed = [p.peer for p in self._registry.peers.values() if p.standing == "removed"]
        removed += [o.operator for o in self._registry.operators.values() if o.removed]
        return json_response(
            NeighborsResponse(
                access_token=gossip.SIGNED_ACCESS_TOKEN.pack(token, self._sign),
                neighbors=tuple(
                    Neighbor(
                        peer=p.peer,
                        name=p.name,
                        address=address,
                        node_public=p.node_public,
                        signs=auth.signature_format(p.peer),
                    )
                    for p, address in self._enrolled(found)
                ),
                removed=tuple(removed[-MAX_LISTED:]),
            )
        )

    async def _pieces(self, digest: str, path: Path) -> bytes:
        """The digests of the version's pieces. Concurrent requests share one computation."""
        if digest not in self._lists:
            while len(self._lists) >= _MAX_LISTS:
                del self._lists[next(iter(self._lists))]
            self._lists[digest] = asyncio.ensure_future(asyncio.to_thread(_piece_digests, path))
        try:
            return await asyncio.shield(self._lists[digest])
        except OSError as err:  # the version was dropped since
            self._lists.pop(digest, None)
            raise HTTPException(404) from err


def _piece_digests(path: Path) -> bytes:
    with path.open("rb") as file:
        return swarm.piece_digests(iter(lambda: file.read(swarm.PIECE_BYTES), b""))


def _outside(request: Request) -> str:
    """The sender's address as the coordinator sees it."""
    return plain_ip(request.client.host) if request.client else ""
