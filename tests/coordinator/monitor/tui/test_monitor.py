"""The keys of the monitor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from textual.pilot import Pilot

from coordinator.api.schema import TicketRequest
from coordinator.monitor.tui.app import MonitorApp
from coordinator.monitor.tui.dialogs import HelpDialog, TicketDialog
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.footer import footer_line
from coordinator.monitor.tui.header import header_line
from coordinator.monitor.tui.page import Frame
from coordinator.monitor.tui.peer_screen import PeerScreen
from protocols.errors import Unreachable
from protocols.messages.envelope import Envelope, EventLine, Presence
from protocols.messages.states import PauseReason, PeerState
from protocols.messages.topics import COORDINATOR
from tests.support.scene import (
    IDS,
    NOW,
    Replay,
    busy_fleet,
    empty_fleet,
    links,
    monitor,
    screen_text,
    settled,
    until,
)


@asynccontextmanager
async def running(
    source: Replay, *, read_only: bool = False, size: tuple[int, int] = (100, 30)
) -> AsyncIterator[tuple[MonitorApp, Pilot[None]]]:
    app = monitor(source, read_only=read_only)
    async with app.run_test(size=size, notifications=True) as pilot:
        await until(pilot, lambda: app.following.stream and app.following.http)
        yield app, pilot


def busy() -> Replay:
    fleet = busy_fleet()
    return Replay(fleet, [links(fleet.seq, epoch=fleet.epoch)])


async def test_pages() -> None:
    async with running(busy()) as (app, pilot):
        for key, page, words in (
            ("2", "rounds", "waits for 2 of 4 peers"),
            ("3", "events", "west lost its connection"),
            ("1", "fleet", "‖ paused: battery"),
        ):
            await pilot.press(key)
            await until(pilot, lambda page=page: app.page == page)  # type: ignore[misc]
            assert words in screen_text(app)


def says(name: str, state: PeerState, reason: str = "", seq: int = 1) -> Envelope:
    body = Presence(state=state, reason=reason, name=name)
    return Envelope(sender=IDS[name], epoch="e2", seq=seq, at=NOW, body=body)


def footer_text(app: MonitorApp) -> str:
    return screen_text(app).splitlines()[-1]


async def test_finish_asks_first() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        await pilot.press("down", "F")
        await until(pilot, lambda: "Finish east?" in screen_text(app))
        await pilot.press("n")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert source.commands == []
        await pilot.press("F", "y")
        await until(pilot, lambda: source.commands == [(IDS["east"], "finish", 0.0)])


async def test_an_action_is_confirmed_by_the_peer() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        page = app.query_one(FleetPage)
        await pilot.press("down", "space", "P")
        await until(pilot, lambda: len(source.commands) == 1)
        assert source.commands == [(IDS["east"], "pause", 0.0)]
        await until(pilot, lambda: "requested: pause east" in screen_text(app))
        assert not any("paused" in event.text for event in app.events), "only sent so far"
        source.live.put_nowait(says("east", PeerState.PAUSED, PauseReason.OPERATOR))
        await until(pilot, lambda: any(e.text == "east has paused" for e in app.events))
        assert "requested:" not in screen_text(app)
        assert page.marked == {IDS["east"]}


async def test_an_impossible_action_shows_the_reason() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        page = app.query_one(FleetPage)
        await pilot.press("end", "space", "P")
        offline = "pause west: it is offline. Try again when it is back."
        await until(pilot, lambda: any(event.text == offline for event in app.events))
        assert source.commands == [], "nothing is sent to who cannot hear"
        page.marked.clear()
        page.marked.add(IDS["south-attic"])
        await pilot.press("F", "y")
        refused = "finish south-attic: the broker is away. Try again when it is back."
        await until(pilot, lambda: any(event.text == refused for event in app.events))


async def test_without_marks_the_peer_under_the_cursor_is_the_target() -> None:
    source = busy()
    async with running(source) as (_, pilot):
        await pilot.press("down", "down", "R")
        await until(pilot, lambda: bool(source.commands))
        assert source.commands == [(IDS["north"], "resume", 0.0)]


async def test_filter_and_faults_only_are_reset() -> None:
    async with running(busy()) as (app, pilot):
        table = app.query_one(FleetPage).table
        await pilot.press("slash", *"office", "enter")
        await until(pilot, lambda: table.row_count == 1)
        assert "east" in screen_text(app)
        await pilot.press("escape")
        await until(pilot, lambda: table.row_count == 6)
        await pilot.press("exclamation_mark")
        await until(pilot, lambda: table.row_count == 2)
        assert "faults only" in screen_text(app)
        await pilot.press("slash", *"zzz", "enter")
        await until(pilot, lambda: "No peer matches" in screen_text(app))


async def test_the_cursor_follows_its_peer() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        page = app.query_one(FleetPage)
        await pilot.press("end")
        assert page.current_peer == IDS["west"]
        await pilot.press("S")
        await settled(pilot)
        assert page.table.cursor_row == 0
        assert page.current_peer == IDS["west"]
        body = Presence(state=PeerState.ERROR, reason="no disk")
        source.live.put_nowait(Envelope(sender=IDS["north"], epoch="e2", seq=1, at=NOW, body=body))
        await until(pilot, lambda: "! error: no disk" in screen_text(app))
        assert page.current_peer == IDS["west"]
        assert any("north has an error" in event.text for event in app.events)
        lines = screen_text(app).splitlines()[4:]  # below the border and the titles
        assert app.fleet is not None
        for line, peer in zip(lines, page.shown, strict=False):
            assert app.fleet.peers[peer].name[:10] in line


async def test_sorting_cycles_through_the_columns() -> None:
    async with running(busy()) as (app, pilot):
        page = app.query_one(FleetPage)
        await pilot.press("s")
        await settled(pilot)
        assert app.fleet is not None
        names = [app.fleet.peers[peer].name for peer in page.shown]
        assert names == sorted(names)
        await pilot.press(*"sssss")
        assert page.sort_by == "state"


async def test_a_frozen_screen_does_not_change() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        await pilot.press("u")
        body = Presence(state=PeerState.ERROR, reason="no disk")
        source.live.put_nowait(Envelope(sender=IDS["north"], epoch="e2", seq=1, at=NOW, body=body))
        await until(
            pilot,
            lambda: (
                app.fleet is not None and app.fleet.peers[IDS["north"]].state is PeerState.ERROR
            ),
        )
        assert "no disk" not in screen_text(app)
        assert "frozen" in screen_text(app)
        await pilot.press("u")
        await until(pilot, lambda: "! error: no disk" in screen_text(app))


async def test_dialogs_open_and_close() -> None:
    async with running(busy()) as (app, pilot):
        for key, kind in (
            ("question_mark", HelpDialog),
            ("enter", PeerScreen),
            ("t", TicketDialog),
        ):
            await pilot.press(key)
            await until(pilot, lambda kind=kind: isinstance(app.screen, kind))  # type: ignore[misc]
            await pilot.press("2", "P", "escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert app.page == "fleet", "keys of the pages do nothing under a dialog"


async def test_messages_while_a_peer_screen_opens() -> None:
    async with running(busy()) as (app, pilot):
        app._show_peer(IDS["north"])
        app._draw(None)  # the screen is there, its parts are not yet
        await until(pilot, lambda: "disk left" in screen_text(app))


async def test_the_palette_runs_commands_by_name() -> None:
    async with running(busy()) as (app, pilot):
        await pilot.press("ctrl+p")
        await until(pilot, lambda: len(app.screen_stack) == 2)
        commands = [command.title for command in app.get_system_commands(app.screen)]
        assert len(commands) > 10
        assert [name for name in commands if len(name) < 4] == [], "words, not letters"
        await pilot.press(*"rounds")
        await settled(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: app.page == "rounds")


async def test_names_are_never_markup() -> None:
    source = busy()
    assert source.fleet is not None
    name = "[bold red]x[/"
    source.fleet.peers[IDS["garden"]].name = name
    async with running(source) as (app, pilot):
        assert name in screen_text(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, PeerScreen))
        await until(pilot, lambda: f"{name}   1 Overview" in screen_text(app))
        await pilot.press("escape", "P")
        await until(pilot, lambda: bool(source.commands))
        await until(pilot, lambda: f"requested: pause {name}" in screen_text(app))


async def test_a_failed_ticket_shows_the_reason() -> None:
    class Closed(Replay):
        def make_ticket(self, order: TicketRequest) -> dict[str, str]:
            raise Unreachable("nobody answers", "Is the coordinator up?")

    source = Closed(empty_fleet(), [links()])
    async with running(source) as (app, pilot):
        assert "No peers yet" in screen_text(app)
        await pilot.press("t")
        text = "cannot make a ticket: nobody answers. Is the coordinator up?"
        await until(pilot, lambda: any(event.text == text for event in app.events))


async def test_read_only_changes_nothing() -> None:
    source = busy()
    async with running(source, read_only=True) as (app, pilot):
        await pilot.press("P", "R", "F", "D", "t")
        await settled(pilot)
        assert source.commands == []
        assert len(app.screen_stack) == 1
        assert "pause" not in screen_text(app).splitlines()[-1]


async def test_lost_connections_are_shown_and_survived() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        assert "mqtt ●" in screen_text(app)
        source.mqtt_up = False
        source.live.put_nowait(Unreachable("the broker is gone"))
        await until(pilot, lambda: "mqtt ○" in screen_text(app))
        assert "stale" not in screen_text(app), "snapshots still come"
        source.http_up = False
        await until(pilot, lambda: "stale 00:00 · retry in 8 s" in screen_text(app))
        assert "south-attic" in screen_text(app)
        source.mqtt_up = source.http_up = True
        source.live.put_nowait(links(99))
        await pilot.press("r")
        await until(pilot, lambda: app.following.stream and app.following.http)
        assert "mqtt ●" in screen_text(app)
        assert "stale" not in screen_text(app)


async def test_many_errors_are_one_message_and_all_events() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        fleet = busy_fleet()
        for number in range(1, 11):
            body = EventLine(level="error", text=f"trouble {number}")
            source.live.put_nowait(
                Envelope(
                    sender=COORDINATOR, epoch=fleet.epoch, seq=fleet.seq + number, at=NOW, body=body
                )
            )
        await until(pilot, lambda: any(event.text == "trouble 10" for event in app.events))
        assert sum("trouble" in event.text for event in app.events) == 10
        await until(pilot, lambda: "trouble 10  and 9 more: 3 shows all" in footer_text(app))
        assert "q quit" not in footer_text(app)
        app.messages.clear()
        app._draw_frame(NOW)
        await until(pilot, lambda: "q quit" in footer_text(app))


async def test_resizing_changes_columns_and_a_small_terminal_is_reported() -> None:
    async with running(busy(), size=(140, 40)) as (app, pilot):
        page = app.query_one(FleetPage)
        assert page.table.columns[-1][0].key == "sent"
        await pilot.press("z")
        await until(pilot, lambda: page.table.columns[-1][0].key == "links")
        await pilot.resize_terminal(60, 20)
        await until(pilot, lambda: page.table.columns[-1][0].key == "seen")
        assert page.table.row_count == 6
        await pilot.resize_terminal(39, 12)
        await until(pilot, lambda: "this terminal is 39×12" in " ".join(screen_text(app).split()))
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: "● training" in screen_text(app))


async def test_a_line_never_mixes_old_and_new_rows() -> None:
    async with running(busy(), size=(100, 30)) as (app, pilot):
        page = app.query_one(FleetPage)
        table = page.table
        before = [table.render_line(y).text for y in range(7)]
        columns = table.columns
        page.styles.display = "none"
        await until(pilot, lambda: page.size.width == 0)
        page.draw(Frame(app.fleet, NOW))
        assert [table.render_line(y).text for y in range(7)] == [""] * 7
        assert (table.columns, table.row_count) == (columns, 6)
        page.styles.display = "block"
        await until(pilot, lambda: page.size.width == 100)
        page.draw(Frame(app.fleet, NOW))
        assert [table.render_line(y).text for y in range(7)] == before


@pytest.mark.parametrize("width", range(40, 160, 7))
def test_header_and_footer_fit(width: int) -> None:
    app = monitor(busy())
    app.following.fleet = busy_fleet()
    app.following.fresh_at = NOW
    header = header_line(app.following, NOW + 2, width).plain
    assert "mqtt" in header
    assert "flower" in header
    assert header.endswith(("2 s old", "2 s"))
    assert len(header) <= width
    if width >= 60:
        assert len(header) <= width
    for page in ("fleet", "rounds", "events"):
        footer = footer_line(page, width).plain
        assert len(footer) <= width
        assert footer.endswith("q quit")
