"""How the monitor looks, in three sizes and in every state it can be in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace
from textual.pilot import Pilot

from coordinator.tui.config import Config
from protocols.errors import Unreachable
from tests.coordinator.tui.scene import (
    IDS,
    NOW,
    Replay,
    busy_fleet,
    empty_fleet,
    links,
    monitor,
    settled,
    until,
)

SIZES = [(60, 20), (80, 24), (140, 40)]
sizes = pytest.mark.parametrize("size", SIZES, ids=[f"{w}x{h}" for w, h in SIZES])


def live(*keys: str) -> Callable[[Pilot[Any]], Awaitable[None]]:
    """Both links are up and what is to be looked at was told; then press `keys`."""

    async def before(pilot: Pilot[Any]) -> None:
        following = pilot.app.following  # type: ignore[attr-defined]
        await until(pilot, lambda: following.stream and following.http)
        pilot.app._draw_ages()  # type: ignore[attr-defined]
        await settled(pilot)
        await pilot.press(*keys)
        await settled(pilot)

    return before


def busy() -> Replay:
    fleet = busy_fleet()
    return Replay(fleet, [links(fleet.seq, epoch=fleet.epoch)])


@sizes
def test_fleet(size: tuple[int, int], snap_compare: Any) -> None:
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=live())


@sizes
def test_rounds(size: tuple[int, int], snap_compare: Any) -> None:
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=live("2"))


@sizes
def test_events(size: tuple[int, int], snap_compare: Any) -> None:
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=live("3"))


@sizes
def test_empty(size: tuple[int, int], snap_compare: Any) -> None:
    source = Replay(empty_fleet(), [links()])
    assert snap_compare(monitor(source), terminal_size=size, run_before=live())


@sizes
def test_disconnected(size: tuple[int, int], snap_compare: Any) -> None:
    source = busy()
    clock = {"now": NOW}
    app = monitor(source)
    app.following._clock = app._clock = lambda: clock["now"]

    async def before(pilot: Pilot[Any]) -> None:
        following = app.following
        await until(pilot, lambda: following.stream and following.http)
        source.http_up = source.mqtt_up = False
        source.live.put_nowait(Unreachable("the broker at 192.0.2.7:1883 does not answer"))
        await until(pilot, lambda: not following.connected)
        clock["now"] += 5
        app._draw_ages()
        await settled(pilot)

    assert snap_compare(app, terminal_size=size, run_before=before)


@sizes
def test_marked_and_filtered(size: tuple[int, int], snap_compare: Any) -> None:
    before = live("space", "down", "space", "slash", "t", "enter", "s", "s", "s", "s")
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=before)


@sizes
def test_peer(size: tuple[int, int], snap_compare: Any) -> None:
    before = live("down", "down", "enter")
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=before)


@sizes
def test_help(size: tuple[int, int], snap_compare: Any) -> None:
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=live("question_mark"))


@sizes
def test_never_reached(size: tuple[int, int], snap_compare: Any) -> None:
    source = Replay(None)
    source.mqtt_up = False
    app = monitor(source)

    async def before(pilot: Pilot[Any]) -> None:
        await until(pilot, lambda: app.following.trouble is not None)

    assert snap_compare(app, terminal_size=size, run_before=before)


def rich() -> Replay:
    """The scene with all that a newer coordinator and newer agents tell."""
    fleet = busy_fleet()
    run = fleet.runs["motion-7"]
    for number, closed in enumerate(run.rounds):
        loss, accuracy = closed.loss or 1.0, closed.accuracy or 0.5
        spread = {
            "loss": (0.8 * loss, loss, 1.3 * loss),
            "accuracy": (0.9 * accuracy, accuracy, min(1.05 * accuracy, 1.0)),
        }
        spent = {"work": 1.1, "wait": 0.4, "aggregate": 0.1, "evaluate": 0.3}
        metrics = {"worst_accuracy": 0.8 * accuracy, "staleness": 0.2 + number % 3}
        told = replace(closed, spread=spread, spent=spent, metrics=metrics)
        run.rounds[number] = told
    north = fleet.peers[IDS["north"]]
    north.tasks, north.disk_free_bytes = ("mnist", "ping"), 41_000_000_000
    north.policy = {"threads": "2", "share_log": "True"}
    return Replay(fleet, [links(fleet.seq, epoch=fleet.epoch)])


@sizes
def test_all_plots(size: tuple[int, int], snap_compare: Any) -> None:
    assert snap_compare(monitor(rich()), terminal_size=size, run_before=live("2", "z"))


PAGES = {"fleet": (), "rounds": ("2",), "events": ("3",), "peer": ("down", "down", "enter")}
pages = pytest.mark.parametrize("keys", PAGES.values(), ids=PAGES)


@sizes
@pages
def test_light(size: tuple[int, int], keys: tuple[str, ...], snap_compare: Any) -> None:
    app = monitor(rich(), config=Config(theme="commonweight-light"))
    assert snap_compare(app, terminal_size=size, run_before=live(*keys))


@sizes
@pages
def test_without_colour(
    size: tuple[int, int],
    keys: tuple[str, ...],
    snap_compare: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert snap_compare(monitor(rich()), terminal_size=size, run_before=live(*keys))


@sizes
def test_everything_beside_the_fleet(size: tuple[int, int], snap_compare: Any) -> None:
    assert snap_compare(monitor(rich()), terminal_size=size, run_before=live())


@pytest.mark.parametrize("keys", ["1", "2", "3"])
def test_ascii(keys: str, snap_compare: Any) -> None:
    app = monitor(rich(), ascii_only=True)
    assert snap_compare(app, terminal_size=(80, 24), run_before=live(keys))


@pytest.mark.parametrize("tab", ["2", "3", "4"])
def test_peer_tabs(tab: str, snap_compare: Any) -> None:
    before = live("down", "down", "enter", tab)
    assert snap_compare(monitor(rich()), terminal_size=(80, 24), run_before=before)


@pytest.mark.parametrize("size", [(60, 20), (80, 24)], ids=["60x20", "80x24"])
def test_a_question(size: tuple[int, int], snap_compare: Any) -> None:
    before = live("down", "ctrl+d")
    assert snap_compare(monitor(busy()), terminal_size=size, run_before=before)


def test_ticket(snap_compare: Any) -> None:
    source = Replay(empty_fleet(), [links()])
    assert snap_compare(monitor(source), terminal_size=(80, 24), run_before=live("t"))


def test_too_small(snap_compare: Any) -> None:
    assert snap_compare(monitor(busy()), terminal_size=(38, 11), run_before=live())
