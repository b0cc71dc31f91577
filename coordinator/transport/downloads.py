"""Versions from a replica that waits: as from the coordinator, at a path of their own.

GET /cw/v1/downloads/{digest}    download a version, or a range of it      (an enrolled peer)
"""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.fleet.auth import Auth
from coordinator.storage.version_cache import VersionCache
from coordinator.transport.weights import digest_of, file_response
from protocols.errors import StoreUnreachable
from protocols.messages.work import DOWNLOAD_PATH

log = logging.getLogger("commonweight.hub")


def downloads_app(auth: Auth, cache: VersionCache) -> Starlette:
    """The app of the one route. 503: the version cannot be fetched now; ask the coordinator."""

    async def download(request: Request) -> Response:
        peer = await auth.peer(request)
        try:
            path = await cache.fetch(digest_of(request), peer.peer)
        except (StoreUnreachable, OSError) as err:
            # A peer can ask for many at once, without end.
            level = logging.DEBUG if isinstance(err, BlockingIOError) else logging.WARNING
            log.log(level, "a version was not sent: %s", err)
            raise HTTPException(503) from err
        if path is None:
            raise HTTPException(404)
        return file_response(request, path)[0]

    return Starlette(routes=[Route(DOWNLOAD_PATH, download)])
