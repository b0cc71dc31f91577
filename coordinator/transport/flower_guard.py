"""The door before Flower's own routes: few are open, and only to requests signed as ours."""

from __future__ import annotations

from base64 import b64encode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.fleet.auth import Auth

#: A key or a node id, and a number.
MAX_BODY_BYTES = 16 * 1024


class FlowerGuard:
    """Lets requests of ours through to Flower: to `open_paths` alone, signed as on our own routes.

    `key_header` is where Flower looks for the sender's node key.

    Flower parses a body before it looks who sent it, and its node authentication signs a timestamp
    alone. So a request that somebody captured could be sent again for five minutes, with another
    body even: a pull swallows the message that the agent waits for, a deactivation takes it
    offline. Our signature covers path, body, time and nonce, and is good once. It is the whole
    price that a stock SuperNode, which does not sign so, is refused like any stranger.
    """

    def __init__(
        self, app: ASGIApp, auth: Auth, open_paths: frozenset[str], key_header: str
    ) -> None:
        self._app, self._auth = app, auth
        self._open_paths, self._key_header = open_paths, key_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._authenticated_body(Request(scope, receive))
        except HTTPException as err:
            await Response(status_code=err.status_code)(scope, receive, send)
            return
        scope.setdefault("state", {})
        given = False

        async def give() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        refused = False

        async def say(message: Message) -> None:
            """Flower's answer; of a refusal only that it is one."""
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = True
                await Response(status_code=message["status"])(scope, receive, send)
            elif not refused:
                await send(message)

        await self._app(scope, give, say)

    async def _authenticated_body(self, request: Request) -> bytes:
        if request.method != "POST" or request.scope["path"] not in self._open_paths:
            raise HTTPException(404)
        peer, body = await self._auth.peer_and_body(request, MAX_BODY_BYTES)
        node_key = b64encode(peer.node_public).decode()
        if request.headers.get(self._key_header) != node_key:
            raise HTTPException(401)  # a peer that has got hold of another's node key
        return body
