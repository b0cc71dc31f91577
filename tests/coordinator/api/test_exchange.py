"""Who has handed in an answer is told of the next work without a doorbell."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.api.exchange import Exchanges, Lingering
from coordinator.fleet.reducer import Fleet
from coordinator.fleet.sessions import NoSession, Sessions
from protocols.messages.work import FlowerMessage, PollRequest, PollResponse


class Noticed(Lingering):
    """Tells when somebody has begun to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.began = asyncio.Event()

    async def wait(self, peer: str, most_s: float) -> None:
        waiting = asyncio.ensure_future(super().wait(peer, most_s))
        await asyncio.sleep(0)
        self.began.set()
        await waiting


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


async def test_work_of_a_new_session_is_not_given_to_the_request_of_the_last_one() -> None:
    """An agent was started again within a second of its answer: its old request still waits."""
    sessions, lingering = Sessions(Fleet(fleet="f")), Noticed()
    taken: list[PollRequest] = []
    sessions.admit("A", 7)
    sessions.opened("A")

    async def exchange_soon(node: int, asked: PollRequest) -> PollResponse:
        taken.append(asked)
        return PollResponse()

    async def settled(settling: object) -> bool:
        return True

    exchanges = Exchanges(
        cast(Any, SimpleNamespace(exchange_soon=exchange_soon, question_of=lambda reply: "q")),
        sessions,
        cast(Any, None),
        cast(Any, SimpleNamespace(settling=lambda q: None, settled=settled, current=None)),
        cast(Any, SimpleNamespace(settling=lambda q: None, at_work=True)),
        lingering,
    )
    asked = asyncio.create_task(
        exchanges.exchange("A", PollRequest(reply=FlowerMessage(message=b"", tree=b"", objects={})))
    )
    await lingering.began.wait()
    looks = len(taken)
    sessions.opened("A")
    lingering.wake("A")  # as new work does
    with pytest.raises(NoSession):
        await asked
    assert len(taken) == looks
