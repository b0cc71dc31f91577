"""Press every binding of every screen, and check its effect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from textual.binding import Binding
from textual.command import CommandPalette
from textual.pilot import Pilot

from coordinator.monitor.tui.app import MonitorApp
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.dialogs import ConfirmDialog, Dialog, HelpDialog, TicketDialog
from coordinator.monitor.tui.events_page import EventsPage
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.jobs_page import JobsPage
from coordinator.monitor.tui.keys import KEYS, REPLAY_ONLY
from coordinator.monitor.tui.peer_screen import PeerScreen
from coordinator.monitor.tui.replay_app import ReplayApp
from coordinator.monitor.tui.rounds_page import RoundsPage
from coordinator.monitor.tui.run_form import RunForm
from coordinator.remote.recording import DEMO_FILE
from coordinator.remote.replay import ReplaySource
from tests.support.scene import (
    IDS,
    Replay,
    busy_fleet,
    crowd_fleet,
    monitor,
    screen_text,
    serving,
    two_runs_fleet,
    until,
)


class Desk(NamedTuple):
    """The state that a test reads."""

    app: MonitorApp
    source: Replay

    @property
    def fleet(self) -> FleetPage:
        return self.app._part(FleetPage)

    @property
    def peer(self) -> PeerScreen:
        assert isinstance(self.app.screen, PeerScreen)
        return self.app.screen

    @property
    def text(self) -> str:
        return screen_text(self.app)

    def shows(self, kind: type[object], words: str = "") -> bool:
        return isinstance(self.app.screen, kind) and words in self.text

    def sent(self, action: str) -> bool:
        return (IDS["north"], action, 0.0) in self.source.commands

    def at_row(self, query: str) -> int:
        return int(self.app.screen_stack[0].query_one(query).cursor_row)  # type: ignore[attr-defined]

    def num_rows(self, query: str) -> int:
        return int(self.app.screen_stack[0].query_one(query).row_count)  # type: ignore[attr-defined]

    def in_field(self) -> int:
        inputs = list(self.app.screen.query("Input"))
        return inputs.index(self.app.focused) if self.app.focused in inputs else -1


class Case(NamedTuple):
    """`so` is false after the keys `first` and true after the key; `undo` reverts it."""

    so: Callable[[Desk], object]
    first: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()


def wrote(pattern: str) -> Callable[[Desk], object]:
    return lambda _: list(Path.cwd().glob(pattern))


def on_tab(tab: str) -> Callable[[Desk], object]:
    return lambda desk: desk.peer.open_tab == tab


def alone(desk: Desk) -> bool:
    """True if no dialog or other screen covers the pages."""
    return len(desk.app.screen_stack) == 1


ON_NORTH = ("home", "down", "down")
PAGES: dict[str, Case] = {
    "space": Case(lambda desk: desk.fleet.marked),
    "P": Case(lambda desk: desk.sent("pause"), ON_NORTH),
    "R": Case(lambda desk: desk.sent("resume"), ON_NORTH),
    "F": Case(lambda desk: desk.shows(ConfirmDialog, "Finish north?"), ON_NORTH),
    "slash": Case(lambda desk: desk.fleet.bar.display),
    "exclamation_mark": Case(lambda desk: "faults only" in desk.text),
    "a": Case(lambda desk: (IDS["garden"], "approve", 0.0) in desk.source.commands),
    "ctrl+d": Case(lambda desk: desk.shows(ConfirmDialog, "Remove")),
    "D": Case(lambda desk: desk.shows(ConfirmDialog, "Drain")),
    "n": Case(lambda desk: desk.shows(RunForm, "A new run")),
    "X": Case(lambda desk: desk.shows(ConfirmDialog, "Stop run motion-7?"), ("2",)),
    "t": Case(lambda desk: desk.shows(TicketDialog, "cw1-")),
    "s": Case(lambda desk: "by peer" in desk.text, undo=tuple("sssss")),
    "S": Case(lambda desk: "by state ↑" in desk.text, undo=("S",)),
    "z": Case(lambda desk: "CPU" in desk.text, undo=("z",)),
    "f": Case(lambda desk: "in place" in desk.text),
    "c": Case(lambda desk: "compared with motion-6" in desk.text, undo=("c",)),
    "u": Case(lambda desk: "frozen" in desk.text, undo=("u",)),
    "y": Case(lambda desk: desk.app.clipboard == IDS["garden"]),
    "x": Case(wrote("commonweight-peers-*.csv")),
    "f8": Case(wrote("*.svg")),
    "r": Case(lambda desk: any("connecting again" in e.text for e in desk.app.events)),
    "1": Case(lambda desk: "awaiting approval" in desk.text, ("2",)),
    "2": Case(lambda desk: "Val loss" in desk.text),
    "3": Case(lambda desk: "west lost its connection" in desk.text, ("z",), ("1", "z")),
    "4": Case(lambda desk: "scatter-c41e88" in desk.text),
    "escape": Case(lambda desk: not desk.fleet.faults_only, ("exclamation_mark",)),
    "ctrl+p": Case(lambda desk: desk.shows(CommandPalette)),
    "question_mark": Case(lambda desk: desk.shows(HelpDialog, "Fleet: one row")),
    "f1": Case(lambda desk: desk.shows(HelpDialog, "Fleet: one row")),
    "q": Case(lambda desk: desk.app._exit),
}
#: Keys that do another thing on another page.
ELSEWHERE: dict[str, Case] = {
    "3 slash": Case(lambda desk: desk.app._part(EventsPage).bar.display, ("3",)),
    "3 exclamation_mark": Case(lambda desk: "warnings and errors" in desk.text, ("3",)),
    "3 f": Case(lambda desk: "not following" in desk.text, ("3",)),
    "3 enter": Case(lambda desk: desk.shows(PeerScreen, "disk left"), ("3", "end")),
    "3 x": Case(wrote("commonweight-events-*.csv"), ("3",)),
    "2 x": Case(wrote("commonweight-rounds-*.csv"), ("2",)),
    "2 y": Case(lambda desk: desk.app.clipboard == "motion-7", ("2",)),
    "2 z": Case(lambda desk: "Val loss" not in desk.text, ("2",), ("z",)),
    "2 c": Case(lambda desk: "compared with motion-6" in desk.text, ("2",), ("c",)),
    "2 f": Case(lambda desk: not desk.app._part(RoundsPage).follow, ("2",), ("f",)),
    "4 x": Case(wrote("commonweight-jobs-*.csv"), ("4",)),
    "4 y": Case(lambda desk: desk.app.clipboard == "scatter-c41e88", ("4",)),
    "4 z": Case(lambda desk: "answers up" not in desk.text, ("4",), ("z",)),
    "4 j": Case(lambda desk: "stopped by the operator" in desk.text, ("4",), ("home",)),
    "4 X": Case(lambda desk: desk.shows(ConfirmDialog, "Stop job scatter-c41e88?"), ("4",)),
}
OPEN = (*ON_NORTH, "enter")
PEER: dict[str, Case] = {
    "1": Case(on_tab("overview"), (*OPEN, "2")),
    "2": Case(on_tab("metrics"), OPEN),
    "3": Case(on_tab("log"), OPEN),
    "4": Case(on_tab("policy"), OPEN),
    **{key: Case(on_tab("metrics"), OPEN) for key in ("tab", "right", "l")},
    **{key: Case(on_tab("policy"), OPEN) for key in ("shift+tab", "left", "h")},
    **{key: Case(alone, OPEN) for key in ("escape", "q", "backspace")},
    "slash": Case(lambda desk: desk.peer.query_one("FilterBar").display, (*OPEN, "3")),
    "exclamation_mark": Case(lambda desk: "connected to" not in desk.text, (*OPEN, "3")),
    **{
        key: Case(lambda desk: desk.peer.query_one("#peer-body").scroll_offset.y == 1, OPEN)
        for key in ("j", "down")
    },
    **{
        key: Case(lambda desk: desk.peer.query_one("#peer-body").scroll_offset.y == 1, more)
        for key, more in (("k", (*OPEN, "j", "j")), ("up", (*OPEN, "j", "j")))
    },
}


def rows(query: str, *first: str) -> dict[str, Case]:
    """The cursor keys of a table."""

    def at(row: int) -> Callable[[Desk], object]:
        return lambda desk: desk.at_row(query) == row % desk.num_rows(query)

    ways = {"j": (at(1), "home"), "k": (at(-2), "end"), "g": (at(0), "end")}
    ways |= {"G": (at(-1), "home"), "end": (at(-1), "home"), "home": (at(0), "end")}
    return {key: Case(so, (*first, start)) for key, (so, start) in ways.items()}


CELLS = rows("#peer-table") | {
    "down": Case(lambda desk: desk.at_row("#peer-table") == 1, ("home",)),
    "up": Case(lambda desk: desk.at_row("#peer-table") == 64, ("end",)),
    **{
        key: Case(lambda desk: desk.at_row("#peer-table") > 2, ("home",))
        for key in ("pagedown", "ctrl+f")
    },
    **{
        key: Case(lambda desk: desk.at_row("#peer-table") < 63, ("end",))
        for key in ("pageup", "ctrl+b")
    },
    "enter": Case(lambda desk: desk.shows(PeerScreen, "disk left")),
}
ROWS = rows("#event-table", "3")
BOXES: dict[type[Any], dict[str, Case]] = {
    Dialog: {key: Case(alone, ("question_mark",)) for key in ("escape", "q", "enter")},
    TicketDialog: {
        "y": Case(lambda desk: desk.app.clipboard.startswith("cw1-"), ("t",)),
        "p": Case(lambda desk: "not possible here: use y" in desk.text, ("t",)),
    },
    ConfirmDialog: {
        "y": Case(lambda desk: desk.source.stopped, ("2", "X")),
        "n": Case(alone, ("2", "X")),
    },
    RunForm: {
        "escape": Case(alone, ("n",)),
        "ctrl+s": Case(lambda desk: "name one task" in desk.text, ("n",)),
        "ctrl+o": Case(lambda desk: "clip norm" in desk.text, ("n",)),
        "down": Case(lambda desk: desk.in_field() == 1, ("n",)),
        "up": Case(lambda desk: desk.in_field() == 0, ("n", "down")),
    },
}


def keys_of(kind: type[Any]) -> set[str]:
    """The keys that the class itself binds."""
    found: set[str] = set()
    for binding in kind.__dict__.get("BINDINGS", []):
        assert isinstance(binding, Binding)
        found |= {key.strip() for key in binding.key.split(",")}
    return found


def test_every_binding_has_a_case() -> None:
    replay = {key.key for key in KEYS if key.id in REPLAY_ONLY}
    assert keys_of(MonitorApp) == PAGES.keys() | replay
    assert keys_of(PeerScreen) == PEER.keys()
    assert keys_of(CellTable) == CELLS.keys()
    for kind, cases in BOXES.items():
        assert keys_of(kind) == cases.keys(), kind
    known = {MonitorApp, PeerScreen, CellTable, *BOXES}
    assert set(_classes_with_bindings()) <= known


def _classes_with_bindings() -> Iterator[type[Any]]:
    """Every class of the monitor that binds keys."""
    for kind in (MonitorApp, ReplayApp, PeerScreen, RunForm, *Dialog.__subclasses__(), Dialog):
        if kind.__dict__.get("BINDINGS"):
            yield kind
    for page in (FleetPage, RoundsPage, EventsPage, JobsPage):
        assert not page.__dict__.get("BINDINGS")


def test_no_key_is_bound_twice() -> None:
    keys = [one for key in KEYS for one in key.key.split(",")]
    assert len(keys) == len(set(keys))


async def press(desk: Desk, pilot: Pilot[None], key: str, case: Case) -> None:
    app = desk.app
    await pilot.press(*case.first)
    await pilot.pause()
    assert not case.so(desk), f"{key}: it was so before"
    await pilot.press(key)
    for _ in range(250):
        if case.so(desk):
            break
        await pilot.pause(0.02)
    assert case.so(desk), f"{key}:\n{desk.text}"
    if app._exit:
        return
    while len(app.screen_stack) > 1:
        await pilot.press("escape")
    await pilot.press(*case.undo)
    if app.page == "events":
        await pilot.press("escape")
    await pilot.press("1", "escape", "home")


async def pressed(
    cases: dict[str, Case], source: Replay, size: tuple[int, int] = (120, 30)
) -> None:
    app = monitor(source)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.following.stream and app.following.http)
        app._draw_ages()  # the alerts are among the events before a key is pressed
        for key, case in cases.items():
            await press(Desk(app, source), pilot, key.rpartition(" ")[2], case)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.long
async def test_keys_of_the_pages() -> None:
    await pressed(PAGES, serving(two_runs_fleet()))


@pytest.mark.long
async def test_keys_with_another_action_on_another_page() -> None:
    await pressed(ELSEWHERE, serving(two_runs_fleet()))


@pytest.mark.long
async def test_keys_of_a_peer() -> None:
    await pressed(PEER, serving(busy_fleet()), (60, 14))


async def test_cursor_keys_of_the_tables() -> None:
    await pressed(CELLS, serving(crowd_fleet(60)), (80, 24))
    await pressed(ROWS, serving(busy_fleet()))


async def test_enter_opens_only_a_peer_under_the_cursor() -> None:
    source = serving(busy_fleet())
    app = monitor(source)
    async with app.run_test(size=(120, 30)) as pilot:
        await until(pilot, lambda: app.following.stream and app.following.http)
        for page in ("2", "4"):
            await pilot.press(page, "home", "j", "enter")
            await pilot.pause()
            assert alone(Desk(app, source)), page


@pytest.mark.long
async def test_keys_of_the_dialogs() -> None:
    for cases in BOXES.values():
        await pressed(cases, serving(busy_fleet()))


async def test_keys_of_a_recording() -> None:
    source = ReplaySource(DEMO_FILE, 1.0)
    app = ReplayApp(source)
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: app.fleet is not None)
        await pilot.press("p")
        assert not source.playing
        for key, so in (
            ("full_stop", lambda before: source.position_s > before),
            ("right_square_bracket", lambda before: source.position_s >= before + 10),
            ("left_square_bracket", lambda before: source.position_s <= before - 9),
        ):
            before = source.position_s
            await pilot.press(key)
            await until(pilot, lambda so=so, before=before: so(before))  # type: ignore[misc]
        assert app.messages.current(time.monotonic()) is None, "said at another time"
        await pilot.press("plus", "plus")
        await until(pilot, lambda: "×4" in screen_text(app))
        await pilot.press("minus")
        await until(pilot, lambda: "×2" in screen_text(app))
