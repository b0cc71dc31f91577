"""Replays a recording as a Source: at any speed, step by step, with seek in both directions.

A fleet is reduced from messages. A seek forward reduces the messages in between, a seek back starts
again from the first one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from coordinator.fleet import state
from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet
from coordinator.remote import recording
from coordinator.remote.formatting import stopwatch
from coordinator.remote.recording import Line
from coordinator.remote.source import ReadOnly
from protocols.errors import CommonweightError
from protocols.local.timed_wait import wait_at_most
from protocols.messages.envelope import Envelope

MAX_BATCH = 64
MIN_SPEED, MAX_SPEED = 1 / 16, 1024.0


class ReplaySource(ReadOnly):
    """A recording. `clock()` is the recorded time at the present position.

    `on_jump` is called when the monitor must fetch a snapshot: after a seek, or where the recorded
    monitor fetched one. `wall` gives monotonic s. Raises UsageError.
    """

    def __init__(
        self, path: Path, speed: float = 1.0, wall: Callable[[], float] = time.monotonic
    ) -> None:
        self.playing = True
        self.speed = min(max(speed, MIN_SPEED), MAX_SPEED)
        self.ended = False
        self.on_jump: Callable[[], None] = lambda: None
        self._path, self._wall = path, wall
        self._head, _ = recording.read(path)
        self.length_s = max((line.t for line in recording.read(path)[1]), default=0.0)
        self._changed = asyncio.Event()
        self._steps = 0
        self._rewind()

    # --- time ---

    @property
    def position_s(self) -> float:
        """Seconds from the start."""
        if not self.playing:
            return self._anchor_s
        played_s = (self._wall() - self._anchored_at) * self.speed
        return min(self._anchor_s + played_s, self.length_s)

    def clock(self) -> float:
        """The recorded time, in Unix s."""
        return self._head.at + self.position_s

    @property
    def status_text(self) -> str:
        """`▶ 00:12/00:40 ×2`."""
        sign = "■" if self.ended else "▶" if self.playing else "‖"
        pace = "" if self.speed == 1 else f" ×{self.speed:g}"
        return f"{sign} {stopwatch(self.position_s)}/{stopwatch(self.length_s)}{pace}"

    def _anchor(self, position_s: float) -> None:
        self._anchor_s, self._anchored_at = position_s, self._wall()
        self._changed.set()

    # --- controls ---

    def play(self) -> None:
        """Pause or continue; at the end, start again."""
        if self.ended:
            self.seek(-self.length_s)
            self.playing = True
        else:
            position_s, self.playing = self.position_s, not self.playing
            self._anchor(position_s)

    def step(self) -> None:
        """Pause, and show the next message."""
        position_s, self.playing = self.position_s, False
        self._steps += 1
        self._anchor(position_s)

    def pace(self, factor: float) -> None:
        """Multiply the speed by `factor`."""
        position_s = self.position_s
        self.speed = min(max(self.speed * factor, MIN_SPEED), MAX_SPEED)
        self._anchor(position_s)

    def seek(self, by_s: float) -> None:
        """Move `by_s` seconds forward, or back if it is negative."""
        goal_s = min(max(self.position_s + by_s, 0.0), self.length_s)
        if by_s < 0:
            self._rewind()
        while self._next is not None and self._next.t <= goal_s:
            self._take()
        self._anchor(goal_s)
        self.on_jump()

    # --- the fleet ---

    def _rewind(self) -> None:
        _, self._lines = recording.read(self._path)
        self._fleet = Fleet(fleet="")
        self.ended = False
        self._next: Line | None = next(self._lines, None)
        # Start with the first snapshot, which contains the messages before it.
        while self._next is not None and self._next.snapshot is None:
            self._next = next(self._lines, None)
        if self._next is not None:
            self._take()
        self._anchor(0.0)

    def _take(self) -> Envelope | None:
        """Apply the next line; return its message, if it is one."""
        line = self._next
        assert line is not None
        now = self._head.at + line.t
        self._next = next(self._lines, None)
        if line.snapshot is not None:
            self._fleet = state.rebase_times(line.snapshot, now)
            self._fleet.gap = False
            self.on_jump()
        elif line.message is not None:
            reduce(self._fleet, line.message, now)
        return line.message

    # --- Source ---

    async def snapshot(self) -> Fleet:
        return state.decode(state.encode(self._fleet, self.clock()))

    async def messages(self) -> AsyncIterator[Envelope]:
        taken = 0
        while True:
            self._changed.clear()
            line = self._next
            if line is None:
                if not self.ended:
                    self.ended, self.playing = True, False
                    self._anchor_s = self.length_s
                self._steps = 0
                await self._changed.wait()
                continue
            if self._steps or (self.playing and self.position_s >= line.t):
                if self._steps:
                    self._steps -= 1
                    self._anchor(line.t)
                if (envelope := self._take()) is not None:
                    yield envelope
                    taken += 1
                    if taken % MAX_BATCH == 0:
                        await asyncio.sleep(0)  # let the screen draw
                continue
            wait_s = (line.t - self.position_s) / self.speed if self.playing else None
            await wait_at_most(self._changed, wait_s)

    def refusal(self) -> CommonweightError:
        return CommonweightError(
            "a recording has only what every monitor receives",
            "for logs and metrics of single peers: commonweight monitor",
        )
