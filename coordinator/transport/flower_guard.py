"""The guard of Flower's own routes: few are open, and only to requests signed as on our routes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.fleet.auth import Auth

#: A key or a node id, and a number.
MAX_BODY_BYTES = 16 * 1024


class FlowerGuard:
    """Passes authenticated requests for `open_paths` to Flower's `app`.

    `key_header` is the header in which Flower expects the sender's node key. `on_success(scope)` is
    called before the sender receives a response of status 200.

    Flower parses a body before it authenticates the sender, and its node authentication signs only
    a timestamp. So a captured request could be repeated for five minutes, even with another body: a
    pull would remove the message that the agent waits for, a deactivation would end its session.
    Our signature covers path, body, time and nonce, and is valid once. The price: a stock
    SuperNode, which does not sign this way, is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        auth: Auth,
        open_paths: frozenset[str],
        key_header: str,
        on_success: Callable[[Scope], None],
    ) -> None:
        self._app, self._auth = app, auth
        self._open_paths, self._key_header = open_paths, key_header
        self._on_success = on_success

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._authenticated_body(Request(scope, receive))
        except HTTPException as err:
            await Response(status_code=err.status_code)(scope, receive, send)
            return
        scope.setdefault("state", {})
        unread = [body]

        async def replay_body() -> Message:
            if not unread:
                return await receive()
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        refused = False

        async def send_bare(message: Message) -> None:
            """Send Flower's response; of a refusal, only its status."""
            nonlocal refused
            if message["type"] == "http.response.start":
                refused = message["status"] >= 400
                if refused:
                    await Response(status_code=message["status"])(scope, receive, send)
                elif message["status"] == 200:
                    self._on_success(scope)
            if not refused:
                await send(message)

        await self._app(scope, replay_body, send_bare)

    async def _authenticated_body(self, request: Request) -> bytes:
        if request.method != "POST" or request.scope["path"] not in self._open_paths:
            raise HTTPException(404)
        peer, body = await self._auth.peer_and_body(request, MAX_BODY_BYTES)
        node_key = b64encode(peer.node_public).decode()
        if request.headers.get(self._key_header) != node_key:
            raise HTTPException(401)  # a peer with another peer's node key
        return body
