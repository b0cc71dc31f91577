"""The short way to the routes that a round asks by the thousand.

Starlette goes through two middlewares, all routes and two more wrappers on its way to an endpoint:
more than a small exchange costs itself. Whatever is not one of these takes that way.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from protocols.messages.work import EXCHANGE_PATH

_DIGEST = "{digest}"
_OFTEN = (EXCHANGE_PATH, f"/cw/v1/weights/{_DIGEST}", f"/cw/v1/updates/{_DIGEST}")


def direct(app: Starlette) -> ASGIApp:
    """`app`, whose endpoints for what is asked often are called without a detour."""
    often = {
        (method, route.path): route.endpoint
        for route in app.routes
        if isinstance(route, Route) and route.path in _OFTEN
        for method in route.methods or ()
    }

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        endpoint = often.get((method, path))
        if endpoint is None:
            folder, _, last = path.rpartition("/")
            endpoint = often.get((method, f"{folder}/{_DIGEST}"))
            if endpoint is not None:
                scope["path_params"] = {"digest": last}
        if endpoint is None:
            await app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive, send))
        except HTTPException as err:
            response = PlainTextResponse(err.detail, err.status_code, headers=err.headers)
        await response(scope, receive, send)

    return serve
