"""The server of the monitor's page: a token, a WebSocket, and a monitor process for each tab.

textual-serve provides the terminal in JavaScript, the protocol between browser, server and process,
and downloads. The page is our own, because that of textual-serve loads a font from another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import shlex
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from aiohttp import web
from textual_serve.app_service import AppService
from textual_serve.server import Server, to_int

from coordinator.monitor.web import DRIVER, is_same_origin

MAX_TABS = 16
MAX_COLUMNS, MAX_ROWS = 1_000, 500
MAX_MESSAGE_BYTES = 1 << 20
HEARTBEAT_S = 15.0
#: How long a monitor may take to end after each step: the request, SIGTERM, SIGKILL.
END_WITHIN_S = 2.0
#: The fonts that textual.js names, and those of the system that replace them.
BUNDLED_FONTS = "'Roboto Mono', Monaco, 'Courier New', monospace"
FONTS = "ui-monospace, 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Tab(AppService):
    """The monitor process of one tab in a browser."""

    _ending: asyncio.Task[None] | None = None

    def _build_environment(self, width: int = 80, height: int = 24) -> dict[str, str]:
        width, height = _clamp(width, MAX_COLUMNS), _clamp(height, MAX_ROWS)
        return super()._build_environment(width, height) | {"TEXTUAL_DRIVER": DRIVER}

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        """Start the command without a shell, which would receive the signals in its place.

        A session of its own keeps the Ctrl-C of the server's terminal from the process: the server
        ends it.
        """
        self._process = process = await asyncio.create_subprocess_exec(
            *shlex.split(self.command),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=self._build_environment(width, height),
            start_new_session=True,
        )
        self._stdin = process.stdin
        return process

    async def set_terminal_size(self, width: int, height: int) -> None:
        await super().set_terminal_size(_clamp(width, MAX_COLUMNS), _clamp(height, MAX_ROWS))

    async def on_data(self, payload: bytes) -> None:
        """Send a frame. Without a browser it is dropped, so that the process is never stuck."""
        with contextlib.suppress(ConnectionError):
            await super().on_data(payload)

    async def run(self) -> None:
        """Relay until the process ends, then close the WebSocket."""
        try:
            await super().run()
        finally:
            with contextlib.suppress(ConnectionError):
                await self.remote_close()

    async def stop(self) -> None:
        """End the process, by force if it hangs. May be called several times."""
        if self._process is None or self._task is None:
            return
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(self._process, self._task))
        await asyncio.shield(self._ending)

    async def _end(self, process: Process, relay: asyncio.Task[None]) -> None:
        await self._download_manager.cancel_app_downloads(app_service_id=self.app_service_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_WITHIN_S):
                await self.send_meta({"type": "quit"})
                await process.wait()
        for end in (process.terminate, process.kill):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    end()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), END_WITHIN_S)
        # A browser that reads no more frames would block the relay for ever.
        await asyncio.wait({relay}, timeout=END_WITHIN_S)
        relay.cancel()


class MonitorServer(Server):
    """Serves the page on `host`:`port`. `words` is the command line of the monitor."""

    def __init__(self, words: Sequence[str], host: str, port: int) -> None:
        super().__init__(shlex.join(words), host=host, port=port, title="commonweight")
        self.authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # The token is in the printed address. The browser keeps another secret.
        self.token, self._session = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        # Cookies of all ports of a host are in one place.
        self._cookie = f"commonweight-{port}"
        self._tabs: set[Tab] = set()
        self._files = _page_files()

    def serve(self, debug: bool = False) -> None:
        """Serve until Ctrl-C or SIGTERM. Raises OSError if the port is taken."""
        web.run_app(
            self._make_app(), host=self.host, port=self.port, access_log=None, print=self._announce
        )

    def _announce(self, *_: object) -> None:
        sys.stderr.write(f"open: http://{self.authority}/?token={self.token}\nCtrl-C stops it\n")
        sys.stderr.flush()

    async def _make_app(self) -> web.Application:
        app = web.Application(middlewares=[self._authorize])
        app.add_routes([web.get(path, self._send_file) for path in self._files])
        app.router.add_get("/ws", self.handle_websocket)
        app.router.add_get("/download/{key}", self.handle_download)
        app.on_response_prepare.append(self._set_headers)
        app.on_shutdown.append(self.on_shutdown)
        return app

    @web.middleware
    async def _authorize(
        self, request: web.Request, handler: Callable[[Any], Awaitable[Any]]
    ) -> Any:
        if request.host != self.authority:  # another name that resolves to this machine
            raise web.HTTPForbidden(text="wrong host name\n")
        origin = request.headers.get("Origin", "")
        if not is_same_origin(origin, request.host) or (request.path == "/ws" and not origin):
            raise web.HTTPForbidden(text="request of another site\n")
        if _is_equal(request.query.get("token", ""), self.token):
            redirect = web.HTTPFound("/")  # keeps the token out of the address bar
            redirect.set_cookie(self._cookie, self._session, httponly=True, samesite="Strict")
            raise redirect
        if not _is_equal(request.cookies.get(self._cookie, ""), self._session):
            raise web.HTTPForbidden(text="open the address that commonweight monitor printed\n")
        return await handler(request)

    async def _set_headers(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(
            {
                # xterm.js sets styles from the script. Older browsers do not count ws: as 'self'.
                "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
                f"style-src 'self' 'unsafe-inline'; connect-src 'self' ws://{self.authority}; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cross-Origin-Opener-Policy": "same-origin",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
            }
        )

    async def _send_file(self, request: web.Request) -> web.Response:
        text, content_type = self._files[request.path]
        return web.Response(text=text, content_type=content_type)

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Run a monitor for a tab until one of the two ends."""
        if len(self._tabs) >= MAX_TABS:
            sys.stderr.write(f"{MAX_TABS} tabs are open: close one before you open another\n")
            raise web.HTTPServiceUnavailable(text="too many tabs are open\n")
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MAX_MESSAGE_BYTES)
        tab = Tab(
            self.command,
            write_bytes=socket.send_bytes,
            write_str=socket.send_str,
            close=socket.close,  # type: ignore[arg-type]
            download_manager=self.download_manager,
        )
        self._tabs.add(tab)
        try:
            await socket.prepare(request)
            query = request.query
            await tab.start(to_int(query.get("width", ""), 80), to_int(query.get("height", ""), 24))
            await self._process_messages(socket, tab)
        except (OSError, ValueError, TypeError, LookupError, AssertionError) as err:
            # The process cannot start, or a message is not one of the page.
            sys.stderr.write(f"the monitor of a tab has ended: {type(err).__name__}: {err}\n")
        finally:
            self._tabs.discard(tab)
            await tab.stop()
        return socket

    async def on_shutdown(self, app: web.Application) -> None:
        """End all tabs."""
        await asyncio.gather(*(tab.stop() for tab in self._tabs))


def _page_files() -> dict[str, tuple[str, str]]:
    """Text and type of each file of the page, by its path in the address."""
    page = resources.files("coordinator.monitor") / "web_page"
    theirs = resources.files("textual_serve") / "static"
    script = (theirs / "js" / "textual.js").read_text("utf-8").replace(BUNDLED_FONTS, FONTS)
    return {
        "/": ((page / "index.html").read_text("utf-8"), "text/html"),
        "/page.css": ((page / "page.css").read_text("utf-8"), "text/css"),
        "/page.js": ((page / "page.js").read_text("utf-8"), "text/javascript"),
        "/xterm.css": ((theirs / "css" / "xterm.css").read_text("utf-8"), "text/css"),
        "/textual.js": (script, "text/javascript"),
    }


def _is_equal(sent: str, secret: str) -> bool:
    """Compares in a time that does not depend on the secret."""
    return hmac.compare_digest(sent.encode(), secret.encode())


def _clamp(size: int, most: int) -> int:
    """A number of columns or rows from a browser, in bounds."""
    return min(max(int(size), 1), most)
