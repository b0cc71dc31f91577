"""Hostile messages to the reducer and the screens: no crash, and no escape code gets out."""

from __future__ import annotations

import random
import re
from typing import Any

import msgspec
import pytest

from coordinator.fleet.prometheus import exposition
from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet, decode, encode
from coordinator.monitor.alerts import alerts
from coordinator.monitor.tui.app import MonitorApp
from protocols.messages.envelope import (
    Body,
    Envelope,
    EventLine,
    JobChanged,
    Links,
    Notice,
    PeerChanged,
    Presence,
    RoundClosed,
    RunChanged,
    Telemetry,
)
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR
from tests.support.scene import NOW, Replay, empty_fleet, monitor, until

WORDS = (
    "",
    "north",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "🏳️‍🌈🏳️‍🌈",
    "日本語の名前はとても長い",
    "a\u202eb\u2066c",
    "e\u0301\u0301\u0301\u0301",
    "[bold]x[/][@click=app.quit]y[/]",
    "x" * 400,
    "line\nline\r\tend",
    "\x00\x07\x08",
    "=cmd()",
)
NUMBERS = (0.0, -1.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 0.3, 1e30)
COUNTS = (0, 1, 7, 2**31, 2**62)
ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def body(rng: random.Random) -> Body:
    """Any value that the types allow, even if the decoder would refuse it."""
    word, number, count = (
        lambda: rng.choice(WORDS),
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(COUNTS),
    )
    peers = [f"P{n}" for n in range(6)]
    level: Any = rng.choice(["info", "warning", "error"])
    made: list[Body] = [
        Presence(
            state=rng.choice(list(PeerState)),
            reason=word(),
            name=word(),
            version=word(),
            run=word(),
            round=count(),
            tasks=(word(),),
            policy={word(): word()},
            disk_free_bytes=count(),
            will=rng.random() < 0.1,
        ),
        Telemetry(
            run=word(),
            round=count(),
            phase="train",
            step=count(),
            steps=count(),
            loss=rng.choice([None, number()]),
            diverged=rng.random() < 0.2,
            samples_per_s=number(),
            bytes_up=count(),
            cpu_percent=number(),
            memory_bytes=count(),
            battery_percent=rng.choice([None, number()]),
        ),
        Notice(level=level, text=word()),
        EventLine(level=level, text=word(), subject=rng.choice([*peers, word()])),
        PeerChanged(
            peer=rng.choice(peers),
            name=word(),
            labels={word(): word()},
            enrollment=rng.choice(["awaiting", "enrolled", "enrolled", "removed"]),
            public_key=bytes(32),
        ),
        RunChanged(
            run=rng.choice(["r1", word()]),
            task=word(),
            state=rng.choice(list(RunState)),
            round=count(),
            rounds=count(),
            quorum=count(),
            asked=count(),
            answered=count(),
            waiting_for=word(),
            ended_because=word(),
        ),
        RoundClosed(
            run="r1",
            round=rng.choice([*COUNTS, *range(40)]),
            digest="0" * 64,
            seconds=number(),
            peers=count(),
            refused=count(),
            loss=rng.choice([None, number()]),
            accuracy=rng.choice([None, number()]),
            diverged=rng.random() < 0.2,
            metrics={word(): number()},
            bytes_up=count(),
            norms={rng.choice(peers): number()},
            spread={"loss": (number(), number(), number()), "accuracy": (0.1, number(), 0.3)},
            spent={rng.choice(["work", "wait", word()]): number()},
            worst={rng.choice(["loss", word()]): rng.choice([*peers, word()])},
            staleness={rng.choice(peers): count()} if rng.random() < 0.3 else {},
        ),
        Links(mqtt=rng.random() < 0.5, flower=rng.random() < 0.5, rejected=count()),
        JobChanged(
            job=rng.choice(["j1", "j2", word()]),
            kind=rng.choice(["scatter", "private", "analyze", word()]),
            task=word(),
            state=rng.choice(["working", "finished", "stopped", "failed", word()]),
            done=count(),
            total=count(),
            peers=count(),
            ended_because=word(),
            leased=count(),
            units=count(),
            rows=count(),
            rows_per_s=number(),
            bytes_up=count(),
            bytes_down=count(),
            dropped=count(),
            num_excused=count(),
            excused={rng.choice([*peers, word()]): word()},
            began_at=number(),
            ended_at=number(),
        ),
    ]
    return rng.choice(made)


def envelopes(rng: random.Random, number: int) -> list[Envelope]:
    found = []
    for seq in range(number):
        said = body(rng)
        peers = isinstance(said, Presence | Telemetry | Notice)
        sender = f"P{rng.randrange(6)}" if peers or rng.random() < 0.05 else COORDINATOR
        found.append(
            Envelope(
                sender=sender,
                epoch=rng.choice(["e1", "e1", "e1", "e2"]),
                seq=seq + rng.choice([0, 0, 0, 0, 5, 1000]),
                at=rng.choice([NOW, NOW - 1e6, NOW + 1e6, *NUMBERS]),
                body=said,
            )
        )
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_reducer_and_its_readers_survive(seed: int) -> None:
    fleet = empty_fleet()
    for number, envelope in enumerate(envelopes(random.Random(seed), 1_500)):
        reduce(fleet, envelope, NOW + number)
    alerts(fleet, NOW)
    exposition(fleet, NOW)
    assert isinstance(encode(fleet, NOW), bytes)


def test_events_are_bounded() -> None:
    fleet = empty_fleet()
    said = EventLine(level="info", text="again")
    for seq in range(1_000_000):
        reduce(fleet, Envelope(sender=COORDINATOR, epoch="e", seq=seq, at=NOW, body=said), NOW)
    assert fleet.num_events == 1_000_000
    assert len(fleet.events) <= 1_100


class Unchecked(Replay):
    """A source whose snapshot comes from the reducer, without a decoder."""

    async def snapshot(self) -> Fleet:
        assert self.fleet is not None
        return self.fleet


def written(app: MonitorApp) -> str:
    """All text that the screen would send to the terminal."""
    lines = app.screen._compositor.render_strips()
    return "".join(segment.text for strip in lines for segment in strip)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(60, 20), (140, 40)])
async def test_the_screens_survive_and_send_no_escape_code(
    seed: int, size: tuple[int, int]
) -> None:
    rng = random.Random(seed)
    stream = envelopes(rng, 1_200)
    fleet = empty_fleet()
    for envelope in stream[:600]:
        reduce(fleet, envelope, NOW)
    known = PeerChanged(peer="P0", name=WORDS[2], public_key=bytes(32))
    reduce(fleet, Envelope(sender=COORDINATOR, epoch="e3", seq=1, at=NOW, body=known), NOW)
    source = Unchecked(fleet, stream[600:])
    app = monitor(source)
    async with app.run_test(size=size, notifications=True) as pilot:
        await until(pilot, lambda: app.fleet is not None and source.live.empty())
        for keys in (
            ["1"],
            ["2"],
            ["4"],
            ["j"],
            ["z"],
            ["2"],
            ["3"],
            ["1", "enter", "2"],
            ["3"],
            ["4"],
        ):
            await pilot.press(*keys)
            await pilot.pause(0.05)  # five drawing intervals
            assert not ESCAPES.search(written(app))
        assert app.is_running


def test_decoded_messages_can_be_encoded_again() -> None:
    fleet, let_in = empty_fleet(), 0
    for envelope in envelopes(random.Random(1), 3_000):
        try:
            heard = msgspec.json.decode(msgspec.json.encode(envelope), type=Envelope)
        except msgspec.DecodeError:
            continue
        reduce(fleet, heard, NOW)
        let_in += 1
    assert let_in > 500
    assert decode(encode(fleet, NOW)).num_events == fleet.num_events
