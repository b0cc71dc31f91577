"""Serve the monitor to a browser with textual-serve: on loopback only, behind a random token.

The page can do everything that the monitor can, and a browser has no operator key. So the server
listens on loopback only; the token keeps out other users and other pages of this machine.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from coordinator.transport.ports import listenable
from protocols.errors import UsageError

COOKIE = "commonweight"


def check_host(host: str) -> str:
    """The address to listen on. Raises UsageError unless it is a loopback address."""
    try:
        local = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as err:
        raise UsageError(f"{host!r} is not an address", "leave --host out") from err
    if not local.is_loopback:
        raise UsageError(
            f"the monitor is not served on {host}: anyone who opens the page could operate the "
            "fleet, and the page has no TLS",
            "leave --host out, and connect from elsewhere with ssh -L PORT:127.0.0.1:PORT; or "
            "watch from there with a ticket: commonweight ticket create --role observer",
        )
    return str(local)


def is_same_origin(origin: str, host: str) -> bool:
    """True for a request of the page itself; a request of another site has its own origin."""
    return origin in ("", f"http://{host}")


def serve_monitor(host: str, port: int, options: Sequence[str]) -> None:
    """Serve until Ctrl-C. Raises UsageError if the extra is missing or `host` is not loopback."""
    host = check_host(host)
    try:
        from aiohttp import web
        from textual_serve.server import Server
    except ImportError as err:
        raise UsageError(
            "the monitor in a browser needs textual-serve", "pip install 'commonweight[serve]'"
        ) from err
    token = secrets.token_urlsafe(24)
    port = port or listenable(host)
    shown = f"[{host}]" if ":" in host else host

    @web.middleware
    async def authorize(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        if request.host != f"{shown}:{port}":  # another name that resolves to this machine
            raise web.HTTPForbidden(text="wrong host name\n")
        if not is_same_origin(request.headers.get("Origin", ""), request.host):
            raise web.HTTPForbidden(text="request of another site\n")
        sent = request.query.get("token", "")
        if sent and hmac.compare_digest(sent.encode(), token.encode()):
            redirect = web.HTTPFound("/")  # keeps the token out of the address bar
            redirect.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            raise redirect
        if not hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), token.encode()):
            raise web.HTTPForbidden(text="open the address that commonweight monitor printed\n")
        return await handler(request)

    class TokenServer(Server):
        async def _make_app(self) -> Any:
            app = await super()._make_app()
            app.middlewares.append(authorize)
            return app

        async def on_startup(self, app: Any) -> None:
            sys.stderr.write(f"open: http://{shown}:{port}/?token={token}\nCtrl-C stops it\n")

        def initialize_logging(self) -> None:
            """Log nothing: it would hide the printed address."""

    command = shlex.join([sys.executable, "-m", "coordinator.cli", "monitor", *options])
    TokenServer(command, host=host, port=port, title="commonweight").serve()
