"""Routes the most frequent requests straight to their endpoints.

Starlette passes each request through two middlewares, the route table and two wrappers. For a small
poll, that costs more than the poll itself. All other requests go through Starlette.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from protocols.messages.work import POLL_PATH

_DIGEST = "{digest}"
_FREQUENT_PATHS = (POLL_PATH, f"/cw/v1/weights/{_DIGEST}", f"/cw/v1/updates/{_DIGEST}")


def with_fast_path(app: Starlette) -> ASGIApp:
    """`app`, with direct calls to the endpoints of the frequent paths."""
    endpoints = {
        (method, route.path): route.endpoint
        for route in app.routes
        if isinstance(route, Route) and route.path in _FREQUENT_PATHS
        for method in route.methods or ()
    }

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        endpoint = endpoints.get((method, path))
        if endpoint is None:
            folder, _, digest = path.rpartition("/")
            endpoint = endpoints.get((method, f"{folder}/{_DIGEST}"))
            if endpoint is not None:
                scope["path_params"] = {"digest": digest}
        if endpoint is None:
            await app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive, send))
        except HTTPException as err:
            response = PlainTextResponse(err.detail, err.status_code, headers=err.headers)
        await response(scope, receive, send)

    return serve
