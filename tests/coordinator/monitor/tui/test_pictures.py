"""Pictures of every screen and state in three sizes, dark, light and without color."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from textual.pilot import Pilot

from coordinator.fleet.state import Fleet
from coordinator.monitor.tui.app import MonitorApp
from coordinator.monitor.tui.config import Config
from protocols.errors import Unreachable
from tests.coordinator.monitor.tui.pictures import FOLDER, SIZES, Album, still, tour
from tests.support import scene
from tests.support.scene import NOW, Replay, monitor, serving, until


class State(NamedTuple):
    """A state of the fleet, and the keys for each picture of it."""

    fleet: Callable[[], Fleet]
    shows: dict[str, tuple[str, ...]]


ON_NORTH = ("down", "down", "enter")
STATES = {
    "going": State(
        scene.rich_fleet,
        {
            "fleet": (),
            "rounds": ("2",),
            "events": ("3",),
            "jobs": ("4",),
            "peer": ON_NORTH,
            "plots": ("2", "z", "z", "z"),
        },
    ),
    "peer": State(
        scene.rich_fleet,
        {"metrics": (*ON_NORTH, "2"), "log": (*ON_NORTH, "3"), "policy": (*ON_NORTH, "4")},
    ),
    "boxes": State(
        scene.busy_fleet,
        {
            "help": ("question_mark",),
            "question": ("down", "ctrl+d"),
            "form": ("n",),
            "form-wrong": ("n", "ctrl+s"),
            "ticket": ("t",),
            "job": ("4", "j"),
            "stop-job": ("4", "X"),
        },
    ),
    "empty": State(
        scene.empty_fleet, {"fleet": (), "rounds": ("2",), "events": ("3",), "jobs": ("4",)}
    ),
    "two-runs": State(scene.two_runs_fleet, {"rounds": ("2", "c")}),
    "troubled": State(scene.troubled_fleet, {"fleet": (), "rounds": ("2",)}),
    "held-up": State(scene.held_up_fleet, {"fleet": (), "rounds": ("2",), "peer": ("enter",)}),
    "buffered": State(scene.buffered_fleet, {"rounds": ("2",), "plots": ("2", "z", "z", "z")}),
    "ended": State(scene.ended_fleet, {"fleet": (), "rounds": ("2",)}),
    "many": State(scene.crowd_fleet, {"fleet": (), "end": ("end",), "rounds": ("2",)}),
}
#: What is not a state of the fleet, but of the way to it.
LINKS = ("connecting", "unreachable", "gone", "brokerless", "filtered", "small", "ascii")
LOOKS = ("dark", "light", "plain")


@pytest.fixture
def album() -> Iterator[Album]:
    kept = Album()
    yield kept
    kept.check()


def app_of(source: Replay, look: str, monkeypatch: pytest.MonkeyPatch) -> MonitorApp:
    if look == "plain":
        monkeypatch.setenv("NO_COLOR", "1")
    theme = "commonweight-light" if look == "light" else ""
    return monitor(source, config=Config(theme=theme))


@asynccontextmanager
async def running(app: MonitorApp, size: tuple[int, int] = SIZES[0]) -> AsyncIterator[Pilot[None]]:
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.following.stream and app.following.http)
        app._draw_ages()
        await still(pilot)
        yield pilot


def label_of(state: str, look: str) -> str:
    return state if look == "dark" else f"{state}-{look}"


@pytest.mark.parametrize(
    "state",
    [pytest.param(s, marks=pytest.mark.long) if s == "boxes" else s for s in STATES],
)
async def test_every_state(state: str, album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    await _pictures(state, "dark", album, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("look", LOOKS[1:])
@pytest.mark.parametrize("state", STATES)
async def test_every_state_in_other_looks(
    state: str, look: str, album: Album, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _pictures(state, look, album, monkeypatch)


async def _pictures(state: str, look: str, album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    of = STATES[state]
    async with running(app_of(serving(of.fleet()), look, monkeypatch)) as pilot:
        await tour(pilot, album, label_of(state, look), of.shows)


async def held(app: MonitorApp, pilot: Pilot[None], retry_at: float | None = None) -> None:
    """Stop the connections: on a slow machine a retry would come between two pictures."""
    app.workers.cancel_all()
    await pilot.pause()
    app.following._next_try = {} if retry_at is None else {"http": retry_at}


async def lost(app: MonitorApp, pilot: Pilot[None], source: Replay) -> None:
    """Both connections are lost for five seconds."""
    source.http_up = source.mqtt_up = False
    source.live.put_nowait(Unreachable("the broker at 192.0.2.7:1883 does not answer"))
    await until(pilot, lambda: not app.following.connected)
    await held(app, pilot, NOW + 8)
    app.following._clock = app._clock = lambda: NOW + 5
    app._draw_ages()
    await still(pilot)


async def test_every_connection_state(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    await _links("dark", album, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("look", LOOKS[1:])
async def test_every_connection_state_in_other_looks(
    look: str, album: Album, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _links(look, album, monkeypatch)


async def _links(look: str, album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(state: str) -> str:
        return label_of(state, look)

    nobody = Replay(None)
    app = app_of(nobody, look, monkeypatch)
    async with app.run_test(size=SIZES[0]) as pilot:
        await held(app, pilot)
        app.following.error = None
        await tour(pilot, album, name("connecting"), {"fleet": ()})
    nobody.mqtt_up = False
    app = app_of(nobody, look, monkeypatch)
    async with app.run_test(size=SIZES[0]) as pilot:
        await until(pilot, lambda: app.following.error is not None)
        await held(app, pilot, NOW + 8)
        await tour(pilot, album, name("unreachable"), {"fleet": (), "jobs": ("4",)})
    source = serving(scene.rich_fleet())
    app = app_of(source, look, monkeypatch)
    async with running(app) as pilot:
        keys = ("space", "down", "space", "slash", "t", "enter", "S")
        await tour(pilot, album, name("filtered"), {"fleet": keys}, SIZES[:2])
        await pilot.resize_terminal(38, 11)
        await still(pilot)
        album.take(app, name("small"))
        await lost(app, pilot, source)
        await tour(pilot, album, name("gone"), {"fleet": (), "rounds": ("2",)})
    source = serving(scene.rich_fleet())
    source.mqtt_up = False
    app = app_of(source, look, monkeypatch)
    async with app.run_test(size=SIZES[0]) as pilot:
        await until(pilot, lambda: app.following.http and not app.following.stream)
        await held(app, pilot)
        app._draw_ages()  # the alerts come with it, and are among the latest events
        await tour(pilot, album, name("brokerless"), {"fleet": ()})


async def test_in_ascii(album: Album) -> None:
    app = monitor(serving(scene.rich_fleet()), ascii_only=True)
    async with running(app, (80, 24)) as pilot:
        shows = {"fleet": (), "rounds": ("2",), "events": ("3",), "jobs": ("4",)}
        await tour(pilot, album, "ascii", shows, ((80, 24),))


def test_every_picture_has_a_state() -> None:
    known = {label_of(state, look) for state in (*STATES, *LINKS) for look in LOOKS}
    for path in FOLDER.iterdir():
        stem = path.stem
        assert any(stem == name or stem.startswith(f"{name}-") for name in known), stem
