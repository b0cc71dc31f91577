"""Waiting in tests: for a condition, with a bound that only a failure reaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait for a condition while the event loop runs; fails after `within_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        await asyncio.sleep(0.01)


def wait_for(
    condition: Callable[[], Any],
    what: str = "the condition",
    within_s: float = 120.0,
    every_s: float = 0.05,
) -> Any:
    """Wait for a condition in this thread, and return its value; fails after `within_s`."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {within_s:.0f} s: {what}"
        time.sleep(every_s)
    return value
