"""The monitor in a browser, by textual-serve: on this machine only, behind a random token.

Whoever can open the page can do what the monitor can. A browser sends no key of ours, so the page
answers on loopback alone; the token keeps out other users and other pages of this machine.
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
    """The address to listen on. Raises UsageError for one that others can reach."""
    try:
        local = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as err:
        raise UsageError(f"{host!r} is no address", "leave --host out") from err
    if not local.is_loopback:
        raise UsageError(
            f"the monitor is not served on {host}: whoever reaches the page could operate the "
            "fleet, and the page has no TLS",
            "leave --host out, and reach it from elsewhere by ssh -L PORT:127.0.0.1:PORT; or "
            "watch from there: commonweight ticket create --role observer",
        )
    return str(local)


def is_same_origin(origin: str, host: str) -> bool:
    """True for a request of the page itself: another site's carries its own origin."""
    return origin in ("", f"http://{host}")


def serve_monitor(host: str, port: int, options: Sequence[str]) -> None:
    """Serve until Ctrl-C. Raises UsageError: the extra is missing, or another address."""
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
    async def gate(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        if request.host != f"{shown}:{port}":  # a foreign name that was made to point here
            raise web.HTTPForbidden(text="another host name\n")
        if not is_same_origin(request.headers.get("Origin", ""), request.host):
            raise web.HTTPForbidden(text="another site\n")
        given = request.query.get("token", "")
        if given and hmac.compare_digest(given.encode(), token.encode()):
            answer = web.HTTPFound("/")  # so that the token stays in no address line
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            raise answer
        if not hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), token.encode()):
            raise web.HTTPForbidden(text="open the address that commonweight monitor printed\n")
        return await handler(request)

    class Gated(Server):
        async def _make_app(self) -> Any:
            app = await super()._make_app()
            app.middlewares.append(gate)
            return app

        async def on_startup(self, app: Any) -> None:
            sys.stderr.write(f"open: http://{shown}:{port}/?token={token}\nCtrl-C ends it\n")

        def initialize_logging(self) -> None:
            """None: what it would print is in nobody's way but the address."""

    command = shlex.join([sys.executable, "-m", "coordinator.cli", "monitor", *options])
    Gated(command, host=host, port=port, title="commonweight").serve()
