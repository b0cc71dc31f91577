"""Waits for an event of asyncio with a time limit."""

from __future__ import annotations

import asyncio
import contextlib


async def wait_at_most(event: asyncio.Event, within_s: float | None) -> None:
    """Wait until `event` is set or `within_s` have passed (None: without a limit).

    Unlike `asyncio.wait_for` before Python 3.12, it loses no cancellation that comes with the
    event.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()
