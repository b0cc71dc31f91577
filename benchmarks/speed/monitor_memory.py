"""python -m benchmarks.speed.monitor_memory [--peers 500 2000] [--rate 1000] [--seconds 600]
    [--trace] [--keep]

Checks that the monitor's memory does not grow. Before the measurement all histories are full
(losses of every peer, 2,000 rounds, 1,000 events), every page was open, and the fleet was fetched
several times, so later growth is a leak. The fleet is simulated in a process of its own that sends
JSON like a coordinator, so its memory does not count. Reports resident MB and Python's blocks in
the first and the last quarter, and the slope of a line through all samples. `--trace` (slow) lists
the lines of code that hold more memory than before.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import psutil
from textual import events

from benchmarks.speed.monitor import SIZE, Crowd, Watched
from coordinator.fleet.reducer import MAX_EVENTS, MAX_LOSSES, MAX_ROUNDS_PER_RUN
from coordinator.fleet.state import Fleet, decode, encode
from coordinator.monitor.tui.gc_tuning import tune_gc
from coordinator.remote.follower import RESYNC_S
from protocols.messages.envelope import Envelope

LOOK_EVERY_S = 5.0
#: Two fetches of the complete fleet, and every key below twice.
WARM_UP_S = 2 * RESYNC_S + 30.0
#: Keys of a user: every page, a peer, cursor movements.
KEYS = ("j", "j", "2", "j", "3", "k", "1", "G", "g", "enter", "2", "escape", "s", "z", "z")


class Apart(Crowd):
    """A crowd in a process of its own: a line of JSON for each message, and for each snapshot that
    is asked for."""

    def __init__(self, peers: int, rate: int) -> None:
        super().__init__(1, rate)  # it creates no messages itself
        self._peers = peers
        self._asked: asyncio.Queue[asyncio.Future[bytes]] = asyncio.Queue()
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None

    async def begin(self) -> None:
        words = [sys.executable, "-m", __spec__.name, "--peers", str(self._peers)]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *words, "--rate", str(self._rate), "--crowd", stdin=pipe, stdout=pipe, limit=2**28
        )
        self._reading = asyncio.create_task(self._read(), name="crowd")

    async def end(self) -> None:
        assert self._process is not None
        self._reading.cancel()
        self._process.kill()
        await self._process.wait()

    def _pipe(self, name: str) -> Any:
        return getattr(self._process, name)

    async def _read(self) -> None:
        async for line in self._pipe("stdout"):
            if line[:1] == b"F":
                self._asked.get_nowait().set_result(line[1:])
            else:
                self._lines.put_nowait(line)

    async def snapshot(self) -> Fleet:
        found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(found)
        self._pipe("stdin").write(b"\n")
        return decode(await found)

    async def messages(self) -> AsyncIterator[Envelope]:
        read = msgspec.json.Decoder(Envelope).decode
        while True:
            line = await self._lines.get()
            self.said += 1
            yield read(line)


async def crowd(peers: int, rate: int) -> None:
    """The process of `Apart`: sends messages, and a snapshot for each line that it reads."""
    source = Crowd(peers, rate)
    source.fill(losses=MAX_LOSSES, rounds=MAX_ROUNDS_PER_RUN, events=MAX_EVENTS + 100)
    asked = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(asked), sys.stdin
    )

    async def answer() -> None:
        while await asked.readline():
            _say(b"F" + encode(await source.snapshot(), time.time()))

    answering = asyncio.create_task(answer())
    async for envelope in source.messages():
        if answering.done():
            return
        _say(msgspec.json.encode(envelope))


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


async def measure(peers: int, rate: int, seconds: float, *, trace: bool) -> dict[str, Any]:
    """Results of one fleet."""
    source = Apart(peers, rate)
    await source.begin()
    app = Watched(source)
    process, looks = psutil.Process(), []
    running = asyncio.create_task(app.run_async(size=SIZE))
    try:
        async for _ in _used(app, WARM_UP_S):
            pass
        before = _traced(trace)
        said, began = source.said, time.monotonic()
        async for at in _used(app, seconds):
            looks.append((at, process.memory_info().rss / 1e6, sys.getallocatedblocks()))
        took = time.monotonic() - began
        if before is not None:
            _tell_growth(before)
        return {
            "peers": peers,
            "messages_per_s": round((source.said - said) / took),
            "seconds": round(took),
            **_figures(looks),
        }
    finally:
        app.exit()
        await running
        await source.end()


def _figures(looks: list[tuple[float, float, int]]) -> dict[str, Any]:
    """The results of samples (second, resident MB, blocks)."""
    quarter = max(len(looks) // 4, 1)
    first, last = looks[:quarter], looks[-quarter:]
    slope = statistics.linear_regression([at for at, _, _ in looks], [mb for _, mb, _ in looks])
    return {
        "rss_mb_first_quarter": round(statistics.median(mb for _, mb, _ in first), 1),
        "rss_mb_last_quarter": round(statistics.median(mb for _, mb, _ in last), 1),
        "rss_mb_most": round(max(mb for _, mb, _ in looks), 1),
        "slope_mb_per_min": round(slope.slope * 60, 3),
        "blocks_first_quarter": round(statistics.median(blocks for _, _, blocks in first)),
        "blocks_last_quarter": round(statistics.median(blocks for _, _, blocks in last)),
    }


async def _used(app: Watched, seconds: float) -> AsyncIterator[float]:
    """Press a key at each sample; return the seconds since the start."""
    began = time.monotonic()
    for number in itertools.count():
        at = time.monotonic() - began
        if at >= seconds:
            return
        app.frames_ms.clear()
        app.post_message(events.Key(KEYS[number % len(KEYS)], None))
        yield at
        await asyncio.sleep(LOOK_EVERY_S)


def _traced(trace: bool) -> tracemalloc.Snapshot | None:
    if not trace:
        return None
    tracemalloc.start(8)
    gc.collect()
    return tracemalloc.take_snapshot()


def _tell_growth(before: tracemalloc.Snapshot) -> None:
    gc.collect()
    for stat in tracemalloc.take_snapshot().compare_to(before, "traceback")[:12]:
        sys.stderr.write(f"{stat.size_diff / 1e3:+.0f} kB, {stat.count_diff:+} blocks\n")
        sys.stderr.write("\n".join(stat.traceback.format()) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    options.add_argument("--peers", type=int, nargs="+", default=[500, 2000])
    options.add_argument("--rate", type=int, default=1000)
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--trace", action="store_true")
    options.add_argument("--crowd", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    chosen = options.parse_args()
    if chosen.crowd:
        asyncio.run(crowd(chosen.peers[0], chosen.rate))
        return
    if len(chosen.peers) > 1:
        found: list[dict[str, Any]] = []
        for peers in chosen.peers:
            words = [sys.executable, "-m", __spec__.name, "--peers", str(peers)]
            words += ["--rate", str(chosen.rate), "--seconds", str(chosen.seconds)]
            words += ["--trace"] if chosen.trace else []
            told = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(told))
            print(told, end="", flush=True)
        if chosen.keep:
            from benchmarks.speed import report  # its imports would count as memory

            report.keep("monitor", {"memory": found})
        return
    tune_gc()
    figures = asyncio.run(measure(chosen.peers[0], chosen.rate, chosen.seconds, trace=chosen.trace))
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
