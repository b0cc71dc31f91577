"""python -m benchmarks.speed.monitor [--peers 500 2000] [--rate 1000] [--seconds 20] [--keep]

The monitor under load: a fleet with this many peers and messages per second, replayed into the real
screens at 140x40. Reports the time per frame (drawing and composing changes, in ms of CPU), the
time from a key to the screen (wall), and the growth of memory. `--seconds 600` is the long run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import psutil
from textual import events
from textual._compositor import Compositor
from textual.drivers.headless_driver import HeadlessDriver

from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet, decode, encode
from coordinator.monitor.tui.app import MonitorApp
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.gc_tuning import tune_gc
from coordinator.remote.source import ReadOnly
from protocols.messages.envelope import (
    Body,
    Envelope,
    EventLine,
    Links,
    PeerChanged,
    Presence,
    RoundClosed,
    RunChanged,
    Telemetry,
)
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR

TICK_S = 0.02
SIZE = (140, 40)


class Crowd(ReadOnly):
    """A Source with `peers` that train, sometimes change their states, and close rounds."""

    def __init__(self, peers: int, rate: int) -> None:
        self._ids = [f"PEER-{number:05d}" for number in range(peers)]
        self._rate = rate
        self._seq: dict[str, int] = {}
        self.said = 0
        self._round = 1
        self._fleet = Fleet(fleet="0123456789abcdef", name="bench")
        for body in (Links(mqtt=True, flower=True), *map(_known, self._ids), self._run()):
            reduce(self._fleet, self._envelope(COORDINATOR, body), time.time())
        for peer in self._ids:
            reduce(self._fleet, self._envelope(peer, _presence(PeerState.TRAINING)), time.time())

    def _envelope(self, sender: str, body: Body) -> Envelope:
        self._seq[sender] = self._seq.get(sender, 0) + 1
        return Envelope(sender=sender, epoch="e", seq=self._seq[sender], at=time.time(), body=body)

    def _run(self) -> RunChanged:
        asked = len(self._ids)
        return RunChanged(
            run="bench-1",
            task="bench",
            state=RunState.TRAINING,
            round=self._round,
            rounds=10_000,
            quorum=asked // 2,
            asked=asked,
            answered=self.said % asked,
        )

    def _next(self) -> tuple[str, Body]:
        self.said += 1
        number = self.said
        if number % 500 == 0:
            self._round += 1
            return COORDINATOR, self._closed(self._round)
        if number % 100 == 0:
            return COORDINATOR, self._run()
        if number % 250 == 1:
            return COORDINATOR, EventLine(level="info", text=f"round {self._round} goes on")
        peer = self._ids[number % len(self._ids)]
        if number % 20 == 0:
            return peer, _presence(PeerState.IDLE if number % 40 else PeerState.TRAINING)
        return peer, self._telemetry(number)

    def _closed(self, number: int) -> RoundClosed:
        share = 1.0 / (number + 1)
        return RoundClosed(
            run="bench-1",
            round=number,
            digest=f"{number:064x}",
            seconds=0.5,
            peers=len(self._ids),
            loss=2.0 * share,
            accuracy=1 - share,
            spread={"loss": (share, 2.0 * share, 3.0 * share)},
            spent={"work": 0.3, "wait": 0.1, "aggregate": 0.05, "evaluate": 0.05},
            norms=dict.fromkeys(self._ids[:200], 1.0 + number % 7),
        )

    def _telemetry(self, number: int) -> Telemetry:
        step = number // len(self._ids) % 40
        return Telemetry(
            run="bench-1",
            round=self._round,
            phase="train",
            step=step,
            steps=40,
            loss=2.0 / (step + 1),
            samples_per_s=900.0,
            bytes_up=number * 100,
            cpu_percent=80.0,
            memory_bytes=400_000_000,
        )

    def fill(self, *, losses: int, rounds: int, events: int) -> None:
        """Start with histories of this length, as after a long run."""
        now = time.time()
        for number in range(rounds):
            reduce(self._fleet, self._envelope(COORDINATOR, self._closed(number)), now)
        self._round = rounds
        for _ in range(events):
            happened = EventLine(level="info", text="a round goes on")
            reduce(self._fleet, self._envelope(COORDINATOR, happened), now)
        for peer in self._ids:
            for number in range(losses):
                reduce(self._fleet, self._envelope(peer, self._telemetry(number)), now)

    async def snapshot(self) -> Fleet:
        return decode(encode(self._fleet, time.time()))

    async def messages(self) -> AsyncIterator[Envelope]:
        began, first = time.monotonic(), self.said
        while True:
            due = int((time.monotonic() - began) * self._rate)
            while self.said - first < due:
                sender, body = self._next()
                envelope = self._envelope(sender, body)
                reduce(self._fleet, envelope, time.time())
                yield envelope
            await asyncio.sleep(TICK_S)


def _known(peer: str) -> PeerChanged:
    return PeerChanged(peer=peer, name=peer.lower(), public_key=bytes(32))


def _presence(state: PeerState) -> Presence:
    return Presence(state=state, version="0.1.0", run="bench-1", round=1)


class Null(HeadlessDriver):
    """Discards the output for the terminal."""

    @property
    def is_headless(self) -> bool:
        return False


class Watched(MonitorApp):
    """Records the cost of each frame, and when it was written."""

    def __init__(self, source: Crowd) -> None:
        super().__init__(source)
        self.driver_class = Null
        self.frames_ms: list[float] = []
        self.on_screen: Callable[[], None] = lambda: None
        self._drawing_s = 0.0
        self._composing_s = 0.0
        compose = Compositor.render_update

        def timed(compositor: Compositor, *given: Any, **named: Any) -> Any:
            began = time.thread_time()
            update = compose(compositor, *given, **named)
            self._composing_s += time.thread_time() - began
            return update

        Compositor.render_update = timed  # type: ignore[method-assign]

    def _draw(self, dirty: Any) -> None:
        began = time.thread_time()
        super()._draw(dirty)
        self._drawing_s += time.thread_time() - began

    def _display(self, screen: Any, renderable: Any) -> None:
        began = time.thread_time()
        super()._display(screen, renderable)
        taken = time.thread_time() - began + self._drawing_s + self._composing_s
        self._composing_s = 0.0
        if self._drawing_s:
            self.frames_ms.append(1000 * taken)
            self._drawing_s = 0.0
        self.on_screen()


async def measure(peers: int, rate: int, seconds: float) -> dict[str, Any]:
    """Results of one load."""
    source = Crowd(peers, rate)
    app = Watched(source)
    process, keys_ms, memory = psutil.Process(), [], []
    running = asyncio.create_task(app.run_async(size=SIZE))
    try:
        await asyncio.sleep(3)
        # Set its position: a cursor that follows its peer could undo the key.
        app.query_one(FleetPage).follow = False
        app.frames_ms.clear()
        said, began, cpu = source.said, time.monotonic(), process.cpu_times()
        number = 0
        while time.monotonic() - began < seconds:
            keys_ms.append(await _key(app, "j" if number // 12 % 2 == 0 else "k"))
            number += 1
            if number % 5 == 0:
                memory.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(0.2)
        took = time.monotonic() - began
        used = process.cpu_times()
        frames = sorted(app.frames_ms)
        third = max(len(memory) // 3, 1)
        return {
            "peers": peers,
            "messages_per_s": round((source.said - said) / took),
            "frames_per_s": round(len(frames) / took, 1),
            "frame_median_ms": round(statistics.median(frames), 1),
            "frame_p95_ms": round(frames[int(0.95 * len(frames))], 1),
            "key_p50_ms": round(statistics.median(keys_ms), 1),
            "key_p95_ms": round(sorted(keys_ms)[int(0.95 * len(keys_ms))], 1),
            "cpu_percent": round(100 * (used.user - cpu.user + used.system - cpu.system) / took),
            "memory_mb": round(memory[-1]),
            "memory_growth_mb": round(
                statistics.median(memory[-third:]) - statistics.median(memory[third : 2 * third]), 1
            ),
        }
    finally:
        app.exit()
        await running


async def _key(app: Watched, key: str) -> float:
    """Press a key that moves the cursor; return the ms until the screen shows it."""
    table = app.query_one("#peer-table")
    before, out = table.cursor_row, asyncio.Event()  # type: ignore[attr-defined]

    def check() -> None:
        if table.cursor_row != before:  # type: ignore[attr-defined]
            out.set()

    app.on_screen = check
    began = time.perf_counter()
    app.post_message(events.Key(key, key))
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            await out.wait()
    app.on_screen = lambda: None
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    options.add_argument("--peers", type=int, nargs="+", default=[500, 2000])
    options.add_argument("--rate", type=int, default=1000)
    options.add_argument("--seconds", type=float, default=20)
    options.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    chosen = options.parse_args()
    tune_gc()
    found: list[dict[str, Any]] = []
    for peers in chosen.peers:
        found.append(asyncio.run(measure(peers, chosen.rate, chosen.seconds)))
        print(json.dumps(found[-1]), flush=True)
    if chosen.keep:
        from benchmarks.speed import report  # its imports would count as memory

        report.keep("monitor", {"rows": found})


if __name__ == "__main__":
    main()
