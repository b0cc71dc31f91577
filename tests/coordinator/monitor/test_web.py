"""The monitor in a browser, without the browser: tests/extras/browser has one.

A client sends what the page sends. What the server starts is the real monitor over a recording.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import httpx
import psutil
import pytest

from coordinator.monitor import web, web_server
from protocols.errors import UsageError
from tests.support.fleet_harness import alive, descendants
from tests.support.waiting import until

WORDS = [sys.executable, "-m", "coordinator.cli", "monitor", "--serve"]


class Served(NamedTuple):
    """A running server: `base` is the address without the token."""

    process: subprocess.Popen[str]
    base: str
    token: str

    @property
    def tabs(self) -> list[psutil.Process]:
        """The processes of the open tabs."""
        return descendants(self.process.pid)

    def log_in(self) -> dict[str, str]:
        """The cookies that the address with the token gives."""
        with httpx.Client(base_url=self.base) as http:
            http.get(f"/?token={self.token}")
            return dict(http.cookies)

    @contextlib.asynccontextmanager
    async def tab(self) -> AsyncIterator[Tab]:
        """What a tab of a browser does, 100 columns by 30 rows."""
        async with (
            aiohttp.ClientSession(cookies=self.log_in()) as client,
            client.ws_connect(
                f"{self.base}/ws?width=100&height=30", headers={"Origin": self.base}
            ) as socket,
        ):
            yield Tab(socket)


class Tab:
    """The WebSocket of a tab; `shown` is all that the monitor has drawn."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.shown = socket, ""

    async def until(self, *words: str) -> None:
        """Wait until the monitor has drawn each of the words."""
        self.shown = ""
        async with asyncio.timeout(60):
            while not all(word in self.shown for word in words):
                message = await self.socket.receive()
                assert message.type is aiohttp.WSMsgType.BINARY, (message, self.shown)
                self.shown += message.data.decode()


@pytest.fixture
def served() -> Iterator[Served]:
    """A server of the built-in recording."""
    with subprocess.Popen(
        [*WORDS, "--replay", "demo"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"open: (http://127\.0\.0\.1:\d+)/\?token=(\S+)", line)
            assert found is not None, line + process.stderr.read()
            yield Served(process, *found.groups())
        finally:
            process.terminate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "2001:db8::1", "example.org"])
def test_only_loopback_addresses_are_accepted(host: str) -> None:
    with pytest.raises(UsageError) as refused:
        web.check_host(host)
    assert host in refused.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_addresses_are_accepted(host: str) -> None:
    assert web.check_host(host) in ("127.0.0.1", "::1")


def test_the_page_needs_the_token_and_its_own_origin(served: Served) -> None:
    token = served.token
    with httpx.Client(base_url=served.base) as http:
        for path in ("/", "/ws", "/textual.js", "/?token=x", "/?token=é", "/download/x"):
            assert http.get(path).status_code == 403, path
        evil = {"Origin": "http://evil.example"}
        assert http.get(f"/?token={token}", headers=evil).status_code == 403
        rebound = {"Host": "evil.example"}
        assert http.get(f"/?token={token}", headers=rebound).status_code == 403
        let_in = http.get(f"/?token={token}")
        assert (let_in.status_code, let_in.headers["location"]) == (302, "/")
        cookie = let_in.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        page = http.get("/")
        assert page.status_code == 200
        assert token not in page.text + cookie
        # No other host can be asked: neither by the page nor by text that a peer brings into it.
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert set(re.findall(r"\w+://[^ ;]+", policy)) == {served.base.replace("http", "ws")}
        for path in ("/", "/page.css", "/page.js"):
            assert not re.search(r"https?://", http.get(path).text), path
        script = http.get("/textual.js").text
        assert web_server.FONTS in script
        assert web_server.BUNDLED_FONTS not in script
        assert not served.tabs


async def test_the_socket_needs_the_cookie_and_an_origin(served: Served) -> None:
    good = served.log_in()
    refused = [
        ({}, {"Origin": served.base}),
        (dict.fromkeys(good, served.token), {"Origin": served.base}),
        (good, {}),
        (good, {"Origin": "null"}),
        (good, {"Origin": "http://127.0.0.1:1"}),
    ]
    for cookies, headers in refused:
        async with aiohttp.ClientSession(cookies=cookies) as client:
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await client.ws_connect(f"{served.base}/ws", headers=headers)
            assert error.value.status == 403, (cookies, headers)
    assert not served.tabs


async def test_each_tab_has_a_monitor_that_ends_with_it(served: Served) -> None:
    async with served.tab() as first:
        await first.until("Fleet", "Peer", "State")
        (process,) = served.tabs
        assert served.token not in " ".join([*process.cmdline(), *process.environ().values()])
        await first.socket.send_json(["stdin", "/"])
        await first.until("id, state or label")
        await first.socket.send_json(["resize", {"width": 30, "height": 10}])
        await first.until("40×12")
        async with served.tab() as second:
            await second.until("Fleet", "Peer", "State")
            assert len(served.tabs) == 2
            await second.socket.send_json(["stdin", "q"])
            async with asyncio.timeout(60):
                while (await second.socket.receive()).type is not aiohttp.WSMsgType.CLOSE:
                    pass
        await until(lambda: served.tabs == [process])
        # What is no message of the page ends only this tab.
        await first.socket.send_json({"not": "a message"})
        await until(lambda: not served.tabs)
    assert served.process.poll() is None


@pytest.mark.parametrize("by", ["terminate", "kill"])
async def test_no_monitor_outlives_the_server(served: Served, by: str) -> None:
    async with served.tab() as tab, served.tab() as starting:
        await tab.until("Fleet", "Peer", "State")
        tabs = served.tabs
        assert len(tabs) == 2
        getattr(served.process, by)()
        served.process.wait(60)
        await until(lambda: not alive(tabs))
        assert starting.socket
    assert served.process.stderr is not None
    assert "Traceback" not in served.process.stderr.read()


async def test_a_monitor_that_hangs_is_killed(served: Served) -> None:
    async with served.tab() as tab:
        await tab.until("Fleet", "Peer", "State")
        (process,) = served.tabs
        process.suspend()
    await until(lambda: not alive([process]))
    assert served.process.poll() is None


def test_what_cannot_be_shown_is_said_before_a_browser_is_opened(tmp_path: Path) -> None:
    missing = [*WORDS, "--replay", str(tmp_path / "missing")]
    done = subprocess.run(missing, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "missing" in done.stderr
    assert "open:" not in done.stderr


def test_a_port_in_use_is_an_error_for_the_user(served: Served) -> None:
    port = served.base.rpartition(":")[2]
    again = [*WORDS, "--replay", "demo", "--port", port]
    done = subprocess.run(again, capture_output=True, text=True, timeout=60, check=False)
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
