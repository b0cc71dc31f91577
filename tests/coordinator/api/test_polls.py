"""Who has handed in an answer is told of the next work without a doorbell."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.api.polls import LongPolls, OwnerNotices, PollHandler
from coordinator.fleet.sessions import NoSession, Sessions
from coordinator.fleet.state import Fleet
from protocols.messages.work import FlowerMessage, PollRequest, PollResponse


class Noticed(LongPolls):
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
    long_polls = LongPolls()
    assert not long_polls.wake("A")
    waiting = asyncio.create_task(long_polls.wait("A", 60))
    await asyncio.sleep(0)
    assert not long_polls.wake("B")
    assert long_polls.wake("A")
    assert not long_polls.wake("A")
    await waiting


async def test_it_waits_no_longer_than_it_may() -> None:
    long_polls = LongPolls()
    await long_polls.wait("A", 0.01)
    assert not long_polls.wake("A")


async def test_a_second_request_takes_the_place_of_one_that_was_given_up() -> None:
    long_polls = LongPolls()
    first = asyncio.create_task(long_polls.wait("A", 60))
    await asyncio.sleep(0)
    second = asyncio.create_task(long_polls.wait("A", 60))
    await first
    assert long_polls.wake("A")
    await second


async def test_work_of_a_new_session_is_not_given_to_the_request_of_the_last_one() -> None:
    """An agent was started again within a second of its answer: its old request still waits."""
    sessions, long_polls = Sessions(Fleet(fleet="f")), Noticed()
    taken: list[PollRequest] = []
    sessions.add("A", 7)
    sessions.open("A")

    async def poll_async(node: int, asked: PollRequest) -> PollResponse:
        taken.append(asked)
        return PollResponse()

    async def settled(settling: object) -> bool:
        return True

    exchanges = PollHandler(
        cast(Any, SimpleNamespace(poll_async=poll_async, request_id_of=lambda reply: "q")),
        sessions,
        cast(Any, None),
        cast(Any, SimpleNamespace(ack_future=lambda q: None, acknowledged=settled, current=None)),
        cast(Any, SimpleNamespace(ack_future=lambda q: None, is_working=True)),
        long_polls,
        cast(Any, None),
        OwnerNotices(),
    )
    asked = asyncio.create_task(
        exchanges.poll("A", PollRequest(reply=FlowerMessage(message=b"", tree=b"", objects={})))
    )
    async with asyncio.timeout(10):
        await long_polls.began.wait()
    looks = len(taken)
    sessions.open("A")
    long_polls.wake("A")  # as new work does
    with pytest.raises(NoSession):
        await asked
    assert len(taken) == looks
