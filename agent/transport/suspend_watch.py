"""Detects that this machine was suspended by comparing its clocks."""

from __future__ import annotations

import time
from typing import NamedTuple

#: A busy machine does not delay our loops by this long.
MIN_SUSPEND_S = 10.0


class Clocks(NamedTuple):
    """Readings of both clocks in seconds."""

    wall: float
    monotonic: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.time(), time.monotonic())


def suspended_s(before: Clocks, after: Clocks, due_s: float) -> float:
    """Returns the excess seconds between two readings planned `due_s` apart; 0 if short.

    The monotonic clock stops during suspend, the wall clock does not. For a frozen process both
    continue. A wall clock set forward looks the same and costs one reconnect.
    """
    passed = max(after.wall - before.wall, after.monotonic - before.monotonic)
    return passed - due_s if passed - due_s >= MIN_SUSPEND_S else 0.0
