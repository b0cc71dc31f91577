"""The effects of the keys, remapped keys, and read-only mode."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from textual.widgets import Input

from coordinator.api.schema import EvaluationsResponse
from coordinator.monitor.tui import config, export, operator_details
from coordinator.monitor.tui.config import Config
from coordinator.monitor.tui.dialogs import ConfirmDialog, HelpDialog, TicketDialog
from coordinator.monitor.tui.events_page import EventsPage
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.keys import KEYS
from coordinator.monitor.tui.peer_screen import TABS, PeerScreen
from coordinator.monitor.tui.run_form import RunForm, _is_first, order, ordered_options
from coordinator.monitor.tui.theme import colors
from protocols.errors import Refused, UnknownName, UsageError
from protocols.messages.envelope import Envelope, PeerChanged, RunChanged
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR
from tests.coordinator.monitor.tui.test_monitor import busy, running, says
from tests.support.scene import (
    IDS,
    NOW,
    Replay,
    busy_fleet,
    monitor,
    rich_fleet,
    screen_text,
    serving,
    until,
)
from tests.support.scene import KEYS as PEER_KEYS


def told(source: Replay, number: int, body: PeerChanged | RunChanged) -> None:
    fleet = busy_fleet()
    seq, epoch = fleet.seq + number, fleet.epoch
    source.live.put_nowait(Envelope(sender=COORDINATOR, epoch=epoch, seq=seq, at=NOW, body=body))


async def test_approve_and_remove_are_confirmed_by_the_fleet() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        garden = IDS["garden"]
        await pilot.press("home", "a")
        await until(pilot, lambda: source.commands == [(garden, "approve", 0.0)])
        told(source, 1, PeerChanged(peer=garden, name="garden", public_key=PEER_KEYS["garden"]))
        await until(pilot, lambda: any(e.text == "garden is approved" for e in app.events))
        await pilot.press("end", "ctrl+d")
        await until(pilot, lambda: isinstance(app.screen, ConfirmDialog))
        await pilot.press("n")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert len(source.commands) == 1, "no is no"
        await pilot.press("ctrl+d")
        await until(pilot, lambda: isinstance(app.screen, ConfirmDialog))
        assert "Remove west?" in screen_text(app)
        await pilot.press("y")
        await until(pilot, lambda: len(source.commands) == 2)
        gone = PeerChanged(
            peer=IDS["west"], name="west", enrollment="removed", public_key=PEER_KEYS["west"]
        )
        told(source, 2, gone)
        await until(pilot, lambda: any(e.text == "west has been removed" for e in app.events))


async def test_drain_waits_until_the_agent_has_left() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        await pilot.press("down", "D")
        await until(pilot, lambda: isinstance(app.screen, ConfirmDialog))
        await pilot.press("y")
        await until(pilot, lambda: source.commands == [(IDS["east"], "finish", 0.0)])
        await until(pilot, lambda: "requested: drain east" in screen_text(app))
        source.live.put_nowait(says("east", PeerState.OFFLINE, "stopped"))
        await until(pilot, lambda: any("east has finished and left" in e.text for e in app.events))


async def test_a_run_is_started_from_the_form_and_stopped() -> None:
    source = busy()
    async with running(source, size=(100, 40)) as (app, pilot):
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, RunForm))
        await pilot.press("enter")
        await until(pilot, lambda: "name one task" in screen_text(app))
        app.screen.query_one("#field-task", Input).value = "ping"
        rounds = app.screen.query_one("#field-rounds", Input)
        assert (rounds.value, rounds.placeholder) == ("", "ends by itself")
        rounds.value = "-1"
        await pilot.press("enter")
        await until(pilot, lambda: "--rounds must be 0 or more, not -1" in screen_text(app))
        rounds.value = "3"
        await pilot.press("enter")
        await until(pilot, lambda: bool(source.orders))
        assert (source.orders[0].spec.task, source.orders[0].spec.rounds) == ("ping", 3)
        begun = RunChanged(
            run="ping-1", task="ping", state=RunState.WAITING, round=0, rounds=3, quorum=1
        )
        told(source, 1, begun)
        await until(pilot, lambda: any("run ping-1 has started" in e.text for e in app.events))
        await pilot.press("2", "X")
        await until(pilot, lambda: isinstance(app.screen, ConfirmDialog))
        await until(pilot, lambda: "commonweight run resume ping-1" in screen_text(app))
        await pilot.press("y")
        await until(pilot, lambda: len(source.stopped) == 1)


def test_the_form_begins_with_what_most_runs_need() -> None:
    names = [option.name for option in ordered_options()]
    assert names[:3] == ["task", "target", "rounds"]
    assert sum(map(_is_first, ordered_options())) < 10


def test_the_form_refuses_what_the_command_line_refuses() -> None:
    assert order({"task": "mnist", "set": "lr=0.1 epochs=2"}).spec.settings == {
        "lr": 0.1,
        "epochs": 2,
    }
    for typed in (
        {},
        {"task": "mnist", "rounds": "many"},
        {"task": "mnist", "deadline": "soon"},
        {"task": "mnist", "weighting": "by mood"},
        {"task": "mnist", "set": "nonsense"},
    ):
        with pytest.raises(UsageError):
            order(typed)
    assert order({"task": "--help"}).spec.task == "--help", "an argument is no option"


async def test_events_are_filtered_and_open_their_peer() -> None:
    async with running(busy()) as (app, pilot):
        await pilot.press("3", "slash", *"norm", "enter")
        page = app.query_one(EventsPage)
        await until(pilot, lambda: page.table.row_count == 1)
        assert "─ Events 1 of " in screen_text(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, PeerScreen))
        assert app.peer_screen is not None
        assert app.peer_screen.peer == IDS["west"]
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await pilot.press("escape", "exclamation_mark")
        await until(pilot, lambda: all(row["level"] != "info" for row in page.export_rows()[1]))


async def test_the_peer_screen_and_its_tabs() -> None:
    source = busy()
    async with running(source) as (app, pilot):
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: isinstance(app.screen, PeerScreen))
        for key, words in (
            ("2", "samples/s"),
            ("3", "the work failed: out of memory"),
            ("4", "commonweight-agent policy set"),
            ("1", "disk left"),
        ):
            await pilot.press(key)
            await until(pilot, lambda words=words: words in screen_text(app))  # type: ignore[misc]
        await pilot.press("3", "exclamation_mark")
        await until(pilot, lambda: "connected to" not in screen_text(app))
        await pilot.press("slash", *"lost", "enter")
        await until(pilot, lambda: "out of memory" not in screen_text(app))
        await pilot.press("P")
        await until(pilot, lambda: source.commands == [(IDS["north"], "pause", 0.0)])
        await pilot.press("escape", "escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert len(TABS) == 4


async def test_an_operator_sees_how_each_peer_evaluated_the_model() -> None:
    async with running(serving(rich_fleet()), size=(140, 40)) as (app, pilot):
        await pilot.press("2")
        await until(pilot, lambda: "Held-out accuracy by peer" in screen_text(app))
        assert "lab-workstati…  61.0 % ━" in screen_text(app)
        await pilot.press("1", "down", "down", "enter")
        await until(pilot, lambda: "accuracy 91.0 %  loss 0.4700 · 400 rows" in screen_text(app))
        await pilot.press("2")
        await until(pilot, lambda: "91.0 %     87.3 %  78.6 % to 91.7 %" in screen_text(app))


async def test_a_run_that_withholds_evaluations_says_why() -> None:
    source = serving(rich_fleet())
    source.withheld = "each peer adds noise of its own"
    async with running(source) as (app, pilot):
        await pilot.press("enter", "2")
        await until(pilot, lambda: f"held out: {source.withheld}" in screen_text(app))


async def test_an_observer_reads_why_and_is_not_refused_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operator_details, "MIN_INTERVAL_S", 0.0)
    asked: list[str] = []

    def refuse(run: str) -> EvaluationsResponse:
        asked.append(run)
        raise Refused("this access may only watch", "ask the operator")

    source = serving(rich_fleet())
    source.evaluations = refuse  # type: ignore[method-assign]
    async with running(source, size=(140, 40)) as (app, pilot):
        await pilot.press("enter", "2")
        words = "held out: this access may only watch. ask the operator"
        await until(pilot, lambda: words in screen_text(app))
        assert app.fleet is not None
        last = app.fleet.runs["motion-7"].rounds[-1]
        app.fleet.runs["motion-7"].rounds.append(replace(last, round=last.round + 1))
        await pilot.press("escape", "2")
        await until(pilot, lambda: "Update norm by peer" in screen_text(app))
        app._draw_ages()
        assert asked == ["motion-7"]


async def test_the_jobs_page_shows_what_each_peer_does() -> None:
    async with running(busy(), size=(140, 40)) as (app, pilot):
        await pilot.press("4")
        await until(pilot, lambda: "✕ takes no part: its owner does not" in screen_text(app))
        assert "north                 ● working          9       1    20,480" in screen_text(app)


async def test_the_events_page_shows_the_selected_event_in_full() -> None:
    async with running(busy(), size=(140, 40)) as (app, pilot):
        await pilot.press("3")
        await until(pilot, lambda: "2 errors" in screen_text(app))
        await pilot.press("f", "home")
        await until(pilot, lambda: "2026-09-21 14:00:01" in screen_text(app))
        await pilot.press("z")
        await until(pilot, lambda: "2026-09-21" not in screen_text(app))


async def test_an_unavailable_log_shows_the_reason() -> None:
    async with running(busy()) as (app, pilot):
        await pilot.press("end", "enter")
        await until(pilot, lambda: isinstance(app.screen, PeerScreen))
        await pilot.press("3")
        await until(pilot, lambda: "west does not answer. It may be offline" in screen_text(app))


async def test_export_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = busy()
    assert source.fleet is not None
    source.fleet.peers[IDS["east"]].name = "=cmd()"
    async with running(source) as (_app, pilot):
        await pilot.press("x", "f8")
        await until(pilot, lambda: len(list(tmp_path.iterdir())) == 3)
        csv = _text(tmp_path, "commonweight-peers-*.csv")
        assert csv.count("\n") == 7
        assert "'=cmd()" in csv, "no spreadsheet runs a peer's name"
        assert _text(tmp_path, "*.svg").startswith("<svg")
        await pilot.press("2", "x")
        await until(pilot, lambda: len(list(tmp_path.glob("commonweight-rounds-*"))) == 2)
        await pilot.press("3", "x")
        await until(pilot, lambda: len(list(tmp_path.glob("commonweight-events-*"))) == 2)
    assert export.as_csv([]) == ""


def _text(folder: Path, pattern: str) -> str:
    (path,) = folder.glob(pattern)
    return path.read_text()


async def test_help_begins_with_the_focused_page() -> None:
    async with running(busy(), size=(100, 60)) as (app, pilot):
        for keys, words in (
            (["f1"], "Fleet: one row"),
            (["2", "question_mark"], "Rounds: the current run"),
            (["3", "question_mark"], "Events: all events"),
            (["1", "enter", "question_mark"], "Peer: 1 overview"),
        ):
            await pilot.press(*keys)
            await until(pilot, lambda: isinstance(app.screen, HelpDialog))
            assert words in screen_text(app)
            await pilot.press("escape")
            await until(pilot, lambda: not isinstance(app.screen, HelpDialog))


async def test_keys_are_remapped_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "monitor.toml"
    path.write_text('theme = "commonweight-light"\n[keys]\nticket = "f6,ctrl+t"\n')
    source = busy()
    app = monitor(source, config=config.read(path))
    async with app.run_test(size=(140, 40)) as pilot:
        await until(pilot, lambda: app.following.stream and app.following.http)
        assert app.theme == "commonweight-light"
        await pilot.press("t")
        assert len(app.screen_stack) == 1
        await pilot.press("f6")
        await until(pilot, lambda: isinstance(app.screen, TicketDialog))
        await pilot.press("escape", "2")
        await until(pilot, lambda: "f6 ticket" in screen_text(app))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[keys]\nfly = 'f'", UnknownName),
        ("[keys]\npause = 'R'", UsageError),
        ("[keys]\npause = ''", UsageError),
        ("nonsense", UsageError),
        ("colour = 1", UsageError),
    ],
)
def test_an_invalid_settings_file_is_refused(
    tmp_path: Path, text: str, error: type[Exception]
) -> None:
    path = tmp_path / "monitor.toml"
    path.write_text(text)
    with pytest.raises(error, match=r"monitor\.toml"):
        config.read(path)
    assert config.read(tmp_path / "none") == Config()


async def test_read_only_has_no_key_that_changes_something() -> None:
    source = busy()
    async with running(source, read_only=True) as (app, pilot):
        for key in KEYS:
            if key.changes:
                await pilot.press(key.key)
        await pilot.press("enter", "P", "F", "R")
        await until(pilot, lambda: isinstance(app.screen, PeerScreen))
        assert (source.commands, source.orders, source.stopped) == ([], [], [])


async def test_every_theme_draws() -> None:
    """Each theme in turn over another page; all text uses the colors of the theme."""
    async with running(busy(), size=(60, 14)) as (app, pilot):
        grounds = set()
        for name in app.available_themes:
            app.theme = name
            await pilot.pause()
            app._draw(None)
            grounds.add(colors().background)
            assert "● training" in screen_text(app), name
        assert len(grounds) > len(app.available_themes) // 2


async def test_a_peer_screen_is_closed_with_a_click() -> None:
    async with running(busy()) as (app, pilot):
        await pilot.press("end")
        for _ in range(2):  # as a double click does
            app._open_peer()
        await until(pilot, lambda: isinstance(app.screen, PeerScreen))
        await pilot.pause()
        await pilot.click(Footer, offset=(1, 0))
        await until(pilot, lambda: len(app.screen_stack) == 1)
