"""Whether this machine has slept, told from its clocks. Pure but for reading them."""

from __future__ import annotations

import time
from typing import NamedTuple

#: No loop of ours is late by so much on a machine that is merely busy.
MIN_SUSPEND_S = 10.0


class Clocks(NamedTuple):
    """Both clocks at one moment, in seconds."""

    wall: float
    monotonic: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.time(), time.monotonic())


def suspended_s(before: Clocks, after: Clocks, due_s: float) -> float:
    """Seconds that passed unseen between two looks that were to be `due_s` apart; 0 if few.

    A sleeping machine's monotonic clock stands still while the wall clock goes on; that of a frozen
    process goes on. A wall clock that was put forward looks the same, and costs one reconnect.
    """
    passed = max(after.wall - before.wall, after.monotonic - before.monotonic)
    return passed - due_s if passed - due_s >= MIN_SUSPEND_S else 0.0
