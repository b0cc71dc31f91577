"""Limits the rate of transfers and counts their bytes per day, across restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.local.atomic_files import read_json, write_private

FILE = "traffic.json"
_SAVE_EVERY_S = 10.0
BYTES_PER_MBIT = 125_000


class Day(Struct, frozen=True, kw_only=True):
    """Bytes up and down on one local day (`2026-11-24`)."""

    day: str = ""
    up: int = 0
    down: int = 0


class RateLimit:
    """Spreads bytes over time. Not thread-safe."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def reserve(self, nbytes: int, bytes_per_s: float) -> float:
        """Returns the seconds to wait before `nbytes` may be sent; 0 if there is no limit."""
        if not nbytes or not bytes_per_s:
            return 0.0
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + nbytes / bytes_per_s
        return start - now


class Bandwidth:
    """Counts each transferred piece and blocks to keep a rate limit. Thread-safe.

    `rates()` returns Mbit/s up and down, 0 for no limit, and may change.
    """

    def __init__(self, home: Path) -> None:
        self._file = home / FILE
        self.rates: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
        self._lock = threading.Lock()
        self._limits = RateLimit(), RateLimit()
        self._saved_at = time.monotonic()
        self._day = read_json(self._file, Day) or Day()

    def sent(self, nbytes: int) -> None:
        self._count(nbytes, 0)

    def passed_on(self, nbytes: int) -> None:
        """Counts bytes sent to another peer, which have a rate limit of their own."""
        with self._lock:
            day = self._today()
            self._day = Day(day=day.day, up=day.up + nbytes, down=day.down)

    def received(self, nbytes: int) -> None:
        self._count(0, nbytes)

    def today(self) -> tuple[int, int]:
        """Returns the bytes up and down since local midnight."""
        with self._lock:
            day = self._today()
            return day.up, day.down

    def save(self, *, at_once: bool = False) -> None:
        """Writes today's count every few seconds. A full disk loses the count only."""
        with self._lock:
            if not at_once and time.monotonic() - self._saved_at < _SAVE_EVERY_S:
                return
            self._saved_at = time.monotonic()
            with suppress(OSError):
                write_private(self._file, msgspec.json.encode(self._today()))

    def _today(self) -> Day:
        today = time.strftime("%Y-%m-%d")
        if self._day.day != today:
            self._day = Day(day=today)
        return self._day

    def _count(self, up: int, down: int) -> None:
        up_mbit_s, down_mbit_s = self.rates()
        with self._lock:
            day = self._today()
            self._day = Day(day=day.day, up=day.up + up, down=day.down + down)
            wait_s = self._limits[0].reserve(up, up_mbit_s * BYTES_PER_MBIT)
            wait_s += self._limits[1].reserve(down, down_mbit_s * BYTES_PER_MBIT)
        if wait_s:
            time.sleep(wait_s)
