"""Who has handed in an answer is told of the next work without a doorbell."""

from __future__ import annotations

import asyncio

from coordinator.exchanges import Lingering


async def test_a_peer_is_woken_once_and_only_while_it_waits() -> None:
    lingering = Lingering()
    assert not lingering.wake("A")
    waiting = asyncio.create_task(lingering.wait("A", 60))
    await asyncio.sleep(0)
    assert not lingering.wake("B")
    assert lingering.wake("A")
    assert not lingering.wake("A")
    await waiting


async def test_it_waits_no_longer_than_it_may() -> None:
    lingering = Lingering()
    await lingering.wait("A", 0.01)
    assert not lingering.wake("A")


async def test_a_second_request_takes_the_place_of_one_that_was_given_up() -> None:
    lingering = Lingering()
    first = asyncio.create_task(lingering.wait("A", 60))
    await asyncio.sleep(0)
    second = asyncio.create_task(lingering.wait("A", 60))
    await first
    assert lingering.wake("A")
    await second
