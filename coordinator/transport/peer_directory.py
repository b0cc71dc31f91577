"""Whom a peer may ask while the coordinator is away: who serves where, and passes.

POST /cw/v1/neighbours   a pass, and peers near by            (an enrolled peer)
GET  /cw/v1/neighbours   a pass, and all who can be asked     (operator, observer)

Kept in memory: each agent tells again when it opens a session.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from coordinator.fleet.auth import Auth
from coordinator.fleet.registry import Registry
from coordinator.transport.piece_sources import is_near
from protocols.messages.envelope import Sign
from protocols.p2p import gossip
from protocols.p2p.gossip import (
    MAX_NEIGHBORS,
    NEIGHBORS_PATH,
    AccessToken,
    Neighbor,
    NeighborsResponse,
)
from protocols.p2p.swarm import DownloadPlanRequest

_MAX_BODY_BYTES = 16 * 1024
_MAX_LISTED = 4096


class _Place(NamedTuple):
    asked: DownloadPlanRequest
    outside: str  # the address that the coordinator sees


class PeerDirectory:
    """Who serves where. Pure."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def update(self, peer: str, asked: DownloadPlanRequest, outside: str) -> None:
        """A peer says where it serves, or that it does not."""
        self._places.pop(peer, None)
        if asked.address:
            self._places[peer] = _Place(asked, outside)

    def nearby(self, peer: str, asked: DownloadPlanRequest, outside: str) -> list[tuple[str, str]]:
        """(peer, address) of some that this one may ask, who told of it last first."""
        found = [
            (other, place.asked.address)
            for other, place in reversed(self._places.items())
            if other != peer
            and is_near(
                place.asked.address,
                place.outside,
                asked,
                outside,
                is_open=place.asked.serves_other_networks,
            )
        ]
        return found[:MAX_NEIGHBORS]

    def all(self) -> list[tuple[str, str]]:
        """(peer, address) of all who serve."""
        return [(peer, place.asked.address) for peer, place in self._places.items()][-_MAX_LISTED:]

    def remove(self, peer: str) -> None:
        self._places.pop(peer, None)


class PeerDirectoryRoutes:
    """The routes over a neighbourhood. `sign` is the coordinator's."""

    def __init__(self, registry: Registry, sign: Sign) -> None:
        self._registry, self._sign = registry, sign
        self.directory = PeerDirectory()

    def routes(self, auth: Auth) -> list[tuple[str, str, Callable[..., object]]]:
        """(method, path, endpoint) of both."""

        async def of_peer(request: Request) -> Response:
            peer, body = await auth.peer_and_body(request, _MAX_BODY_BYTES)
            try:
                asked = msgspec.json.decode(body, type=DownloadPlanRequest)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
                raise HTTPException(400) from err
            outside = request.client.host if request.client else ""
            self.directory.update(peer.peer, asked, outside)
            near = self.directory.nearby(peer.peer, asked, outside)
            return self._answer(peer.peer, peer.sign_public, near, words_only=False)

        async def of_operator(request: Request) -> Response:
            await auth.operator(request, changes=False)
            holder, public = auth.operator_key(request)
            return self._answer(holder, public, self.directory.all(), words_only=True)

        return [("POST", NEIGHBORS_PATH, of_peer), ("GET", NEIGHBORS_PATH, of_operator)]

    def _answer(
        self, holder: str, public: bytes, near: list[tuple[str, str]], *, words_only: bool
    ) -> Response:
        known, until = self._registry.peers, time.time() + gossip.ACCESS_TOKEN_LIFETIME_S
        given = AccessToken(holder=holder, sign_public=public, until=until, gossip_only=words_only)
        removed = [p.peer for p in known.values() if p.standing == "removed"]
        removed += [o.operator for o in self._registry.operators.values() if o.removed]
        answer = NeighborsResponse(
            access_token=gossip.SIGNED_ACCESS_TOKEN.pack(given, self._sign),
            neighbors=tuple(
                Neighbor(
                    peer=other,
                    name=known[other].name,
                    address=address,
                    node_public=known[other].node_public,
                )
                for other, address in near
                if other in known and known[other].standing == "enrolled"
            ),
            removed=tuple(removed[-_MAX_LISTED:]),
        )
        return Response(msgspec.json.encode(answer), media_type="application/json")
