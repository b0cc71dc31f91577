"""The monitor in a real browser: what is seen, what keys and clicks do, and what ends when."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, expect

from coordinator.monitor.tui.theme import DARK
from tests.extras.browser.page import SIZE, Served
from tests.support.fleet_harness import alive, environment, fleet
from tests.support.waiting import wait_for

PHONE = {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True}
DEMO = ("--replay", "demo")
FLEET_PAGE, EVENTS_PAGE, PEER_SCREEN = "State ↓", "╭─ Events", "1 Overview"
Serve = Callable[..., Served]


def colors(picture: bytes) -> set[str]:
    """The colors of a picture, as `#rrggbb`."""
    found = Image.open(io.BytesIO(picture)).convert("RGB").getcolors(1 << 24)
    return {"#" + "".join(f"{part:02x}" for part in color) for _, color in found or ()}


def test_peers_are_seen_and_keys_and_clicks_work(serve: Serve) -> None:
    tab = serve(*DEMO).open()
    tab.until("agent1", "agent5", "5/5 peers", FLEET_PAGE)
    tab.press("p")  # pauses the recording: rows change places while it plays
    seen = colors(tab.take_picture("fleet"))
    assert {DARK.background, DARK.text, DARK.dim, DARK.blue} <= seen
    tab.press("3")
    tab.until(EVENTS_PAGE, "agent1 joined")
    tab.click("Rounds")
    tab.until("Accuracy", without=EVENTS_PAGE)
    tab.take_picture("rounds")
    tab.press("1")
    tab.until(FLEET_PAGE)
    tab.press("Home", "Enter")
    tab.until(PEER_SCREEN)
    tab.take_picture("peer")
    tab.press("Escape")
    tab.until(FLEET_PAGE, "agent4")
    # The first click moves the cursor to the row, and a click on the cursor opens the peer.
    tab.press("End")
    spot = tab.spot(" agent")
    tab.page.mouse.click(*spot)
    tab.page.mouse.click(*spot)
    tab.until(PEER_SCREEN)
    tab.click("back")
    tab.until(FLEET_PAGE, without=PEER_SCREEN)


def test_quit_ends_the_page_and_enter_starts_it_again(serve: Serve) -> None:
    served = serve(*DEMO)
    tab = served.open()
    tab.until("agent1", FLEET_PAGE)
    (first,) = served.processes
    tab.press("q")
    again = tab.page.get_by_role("button", name="Start it again")
    expect(again).to_be_focused()
    wait_for(lambda: not alive([first]))
    tab.take_picture("ended")
    tab.press("Enter")
    tab.until("agent1", FLEET_PAGE)
    assert len(served.processes) == 1


def test_the_window_sizes_the_screen(serve: Serve) -> None:
    tab = serve(*DEMO).open()
    tab.until("agent1", "Samples")
    columns, rows = tab.columns, len(tab.lines)
    tab.page.set_viewport_size({"width": SIZE["width"] // 2, "height": SIZE["height"] // 2})
    tab.until("agent1", without="Samples")
    wait_for(lambda: "q quit" in tab.lines[-1])
    assert (columns // 2, rows // 2) == pytest.approx((tab.columns, len(tab.lines)), abs=1)
    tab.page.set_viewport_size({"width": 300, "height": 150})
    tab.until("40×12")
    tab.page.set_viewport_size(SIZE)
    tab.until("agent1", "Samples")
    assert (tab.columns, len(tab.lines)) == (columns, rows)


def test_it_fits_a_phone_and_needs_no_keyboard(serve: Serve) -> None:
    tab = serve(*DEMO).open(**PHONE)
    tab.until("agent1", FLEET_PAGE)
    assert 40 <= tab.columns <= 60
    width = tab.page.evaluate("document.documentElement.scrollWidth")
    assert width == PHONE["viewport"]["width"]
    tab.take_picture("phone-fleet")
    tab.page.touchscreen.tap(*tab.spot("Rounds"))
    tab.until("Accuracy")
    tab.take_picture("phone-rounds")
    tab.page.touchscreen.tap(*tab.spot("Fleet"))
    tab.until(FLEET_PAGE)
    tab.press("Enter")
    tab.until(PEER_SCREEN)
    assert "4 Policy" in tab.lines[1]
    tab.take_picture("phone-peer")
    tab.page.touchscreen.tap(*tab.spot("back"))
    tab.until(FLEET_PAGE, without=PEER_SCREEN)


def test_each_tab_has_a_process_that_ends_with_it(serve: Serve) -> None:
    served = serve(*DEMO)
    context = served.context()
    first, second = served.open(context), served.open(context)
    for tab in (first, second):
        tab.until("agent1", FLEET_PAGE)
    before = served.processes
    assert len(before) == 2
    second.page.close()
    wait_for(lambda: len(served.processes) == 1)
    first.page.reload()
    first.until("agent1", FLEET_PAGE)
    wait_for(lambda: len(served.processes) == 1)
    assert not alive(before)
    first.press("3")
    first.until(EVENTS_PAGE)
    context.close()
    wait_for(lambda: not served.processes)
    assert served.program.process.poll() is None


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_all(serve: Serve, how: signal.Signals) -> None:
    served = serve(*DEMO)
    tabs = [served.open(), served.open()]
    for tab in tabs:
        tab.until("agent1", FLEET_PAGE)
    processes = served.processes
    assert len(processes) == 2
    served.program.process.send_signal(how)
    served.program.wait(20)
    assert not alive(processes)
    for tab in tabs:
        expect(tab.page.get_by_text("The monitor has ended.")).to_be_visible()
    assert "Traceback" not in served.program.log


def test_the_token_is_needed_and_kept_nowhere(serve: Serve) -> None:
    served = serve(*DEMO)
    stranger = served.context().new_page()
    for address in (served.base, f"{served.base}/?token=wrong", f"{served.base}/textual.js"):
        response = stranger.goto(address)
        assert response is not None
        assert response.status == 403, address
    context = served.context()
    tab = served.open(context)
    tab.until("agent1", FLEET_PAGE)
    assert tab.page.url == f"{served.base}/"
    assert tab.page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == [
        "",
        0,
        0,
    ]
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert cookie["value"] != served.token
    for process in served.processes:
        told = " ".join([*process.cmdline(), *process.environ().values()])
        assert served.token not in told
        assert cookie["value"] not in told
    assert served.program.log.count(served.token) == 1, "in the address that it prints"
    assert cookie["value"] not in served.program.log


class OtherSite(ThreadingHTTPServer):
    """A page on this machine at another port, to which browsers send the same cookies."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _OtherPage)
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []


class _OtherPage(BaseHTTPRequestHandler):
    server: OtherSite

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!DOCTYPE html><title>other</title>")

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def other_site() -> Iterator[OtherSite]:
    with OtherSite() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_no_other_site_can_use_the_cookie(
    serve: Serve, other_site: OtherSite, browser: Browser
) -> None:
    served = serve(*DEMO)
    context = served.context()
    served.open(context).until("agent1", FLEET_PAGE)
    with browser.new_context() as elsewhere:
        elsewhere.add_cookies(context.cookies())
        page = elsewhere.new_page()
        page.goto(other_site.base)
        script = """(address) => new Promise((done) => {
            const socket = new WebSocket(address);
            socket.onopen = () => done("open");
            socket.onerror = () => done("refused");
        })"""
        assert page.evaluate(script, served.base.replace("http", "ws") + "/ws") == "refused"
        read = "(address) => fetch(address, {mode: 'no-cors', credentials: 'include'})"
        with pytest.raises(Error, match="Failed to fetch"):
            page.evaluate(f"{read}.then(() => 0)", served.base)
        frame = """(address) => new Promise((done) => {
            const frame = document.createElement("iframe");
            frame.onload = () => done();
            frame.src = address;
            document.body.append(frame);
        })"""
        page.evaluate(frame, served.base)
        assert all("Starting the monitor" not in one.content() for one in page.frames[1:])
    assert len(served.processes) == 1


def test_the_page_can_ask_no_other_host(
    serve: Serve, other_site: OtherSite, browser: Browser
) -> None:
    served = serve(*DEMO)
    with browser.new_context() as context:
        tab = served.open(context)
        tab.until("agent1", FLEET_PAGE)
        script = """(address) => new Promise((done) => {
            const blocked = [];
            document.addEventListener("securitypolicyviolation", (event) => {
                blocked.push(event.effectiveDirective);
                if (blocked.length === 4) done(blocked.sort());
            });
            for (const [kind, name] of [["script", "src"], ["link", "href"], ["img", "src"]]) {
                const part = document.createElement(kind);
                part.rel = "stylesheet";
                part[name] = address;
                document.head.append(part);
            }
            fetch(address).catch(() => {});
        })"""
        blocked = tab.page.evaluate(script, other_site.base)
        assert blocked == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
        refused = tab.page.evaluate("(address) => window.open(address) === null", other_site.base)
        assert refused is True
        assert tab.page.evaluate("window.open() === null") is True, "what a click on a link does"
    assert not other_site.asked


def test_a_live_fleet_for_the_operator_and_an_observer(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    folder.mkdir()
    with fleet(folder) as real:
        real.up()
        real.join("north", "south")
        real.start("north", "south")
        home = environment(real.folder, COMMONWEIGHT_HOME=str(real.home))
        operator = serve(env=home).open()
        operator.until("north", "south", "2/2 peers", "idle")
        operator.take_picture("live")
        ticket = tmp_path / "ticket"
        ticket.write_text(str(real.data("ticket", "create", "--role", "observer")["ticket"]))
        env = environment(tmp_path / "elsewhere")
        observer = serve("--join", f"file:{ticket}", env=env).open()
        observer.until("north", "south", "2/2 peers")
        watching = serve("--read-only", env=home).open()
        watching.until("north", "south", "2/2 peers")
        for tab, may_change in ((operator, True), (observer, False), (watching, False)):
            tab.press("End")
            assert ("P pause" in tab.lines[-1]) is may_change
        operator.press("P")
        for tab in (operator, observer, watching):
            tab.until("paused")
        real.programs["north"].stop()
        for tab in (operator, observer, watching):
            tab.until("0/2 peers", "offline: stopped")
