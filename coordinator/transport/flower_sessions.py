"""Flower's two routes that our agents use: they open and close a session.

Two endpoints check our signature and the node's, and call Flower's own handlers. Flower's node
authentication signs only a timestamp. So a captured request could be repeated for five minutes,
even with another body, and end its sender's session. The signature that `auth` checks covers path,
body, time and nonce, and is valid once. The price: a stock SuperNode, which does not sign this way,
is refused.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.fleet.auth import Auth
from coordinator.transport.flower import Superlink

FLEET_PREFIX = "/v1/fleet/"
#: A key or a node id, and a number.
MAX_BODY_BYTES = 16 * 1024


def sessions_app(superlink: Superlink, auth: Auth) -> Starlette:
    """The app of the two routes. Errors have no body."""
    state = superlink.state

    def activate(request: ActivateNodeRequest) -> Any:
        # End the previous session of this key. Flower refuses a second one, so an agent that was
        # killed and restarted would have to wait until its old heartbeats expire.
        if (node_id := superlink.nodes.get(request.public_key)) is not None:
            state.deactivate_node(node_id)
        return fleet_handlers.activate_node(request=request, state=state)

    def deactivate(request: DeactivateNodeRequest) -> Any:
        return fleet_handlers.deactivate_node(request=request, state=state)

    def route(action: str, kind: type[Any], handle: Callable[[Any], Any]) -> Route:
        async def endpoint(request: Request) -> Response:
            peer, body = await auth.peer_and_body(request, MAX_BODY_BYTES)
            node_key = b64encode(peer.node_public).decode()
            if request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER) != node_key:
                raise HTTPException(401)  # a peer with another peer's node key
            try:
                message = request.state.protobuf_request = kind.FromString(body)
            except DecodeError as err:
                raise HTTPException(400) from err
            await run_in_threadpool(authenticate_node, request)
            answer = await run_in_threadpool(handle, message)
            superlink.on_request(action, superlink.nodes.get(peer.node_public, 0))
            return Response(answer.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)

        return Route(FLEET_PREFIX + action, endpoint, methods=["POST"])

    app = Starlette(
        routes=[
            route("activate-node", ActivateNodeRequest, activate),
            route("deactivate-node", DeactivateNodeRequest, deactivate),
        ],
        exception_handlers={HTTPException: _bare_error, FlowerError: _bare_error},
    )
    app.state.linkstate_factory = superlink.factory  # where `authenticate_node` looks for it
    return app


async def _bare_error(_: Request, err: Exception) -> Response:
    if isinstance(err, FlowerError):
        return Response(status_code=API_ERROR_MAP[err.code].http_status_code)
    assert isinstance(err, HTTPException)
    return Response(status_code=err.status_code)
