"""How a fleet is kept current: snapshots, live messages, polling, gaps, lost connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from coordinator.fleet.reducer import reduce
from coordinator.remote.follower import FleetFollower, jittered
from protocols.errors import Unreachable
from protocols.messages.envelope import Envelope, Presence
from protocols.messages.states import PeerState
from protocols.messages.topics import COORDINATOR
from tests.support.scene import IDS, NOW, Replay, busy_fleet, empty_fleet, known, links


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.remote.follower.POLL_S", 0.1)


@asynccontextmanager
async def following(source: Replay) -> AsyncIterator[FleetFollower]:
    follow = FleetFollower(source, lambda: NOW, lambda attempt: 0.01)
    task = asyncio.create_task(follow.run())
    try:
        yield follow
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def presence(seq: int, state: PeerState, epoch: str = "e2") -> Envelope:
    body = Presence(state=state)
    return Envelope(sender=IDS["north"], epoch=epoch, seq=seq, at=NOW, body=body)


def state_of(follow: FleetFollower) -> PeerState | None:
    peer = follow.fleet.peers.get(IDS["north"]) if follow.fleet else None
    return peer.state if peer else None


async def test_live_messages_that_came_before_the_snapshot_are_not_lost() -> None:
    source = Replay(busy_fleet(), [presence(1, PeerState.IDLE)])
    source.http_up = False
    async with following(source) as follow:
        await eventually(lambda: follow.stream)
        assert follow.fleet is None
        source.http_up = True
        follow.reconnect()
        await eventually(lambda: state_of(follow) is PeerState.IDLE)
        assert follow.changed_peers or follow.all_changed


async def test_a_gap_fetches_a_new_snapshot() -> None:
    fleet = empty_fleet()
    reduce(fleet, links(1), NOW)
    source = Replay(fleet, [])
    async with following(source) as follow:
        await eventually(lambda: source.snapshots == 1)
        before = follow.fleet
        unseen = Envelope(sender=COORDINATOR, epoch="e9", seq=2, at=NOW, body=known("north"))
        reduce(fleet, unseen, NOW)
        reduce(fleet, links(3), NOW)
        source.live.put_nowait(links(3))
        await eventually(lambda: state_of(follow) is not None)
        assert follow.fleet is not None
        assert not follow.fleet.gap
        assert follow.fleet is before, "a page that holds the fleet holds no old one"


async def test_snapshots_are_polled_without_live_messages() -> None:
    source = Replay(busy_fleet())
    source.mqtt_up = False
    async with following(source) as follow:
        await eventually(lambda: source.snapshots >= 2)
        assert not follow.stream
        assert follow.connected


async def test_a_lost_connection_is_retried_forever() -> None:
    source = Replay(busy_fleet(), [links(99, epoch="e1")])
    async with following(source) as follow:
        await eventually(lambda: follow.stream and follow.http)
        source.http_up = source.mqtt_up = False
        source.live.put_nowait(Unreachable("the broker is gone"))
        await eventually(lambda: not follow.connected)
        assert follow.fleet is not None, "what was known stays"
        assert follow.error is not None
        source.http_up = source.mqtt_up = True
        source.live.put_nowait(presence(5, PeerState.SENDING))
        await eventually(lambda: follow.stream and follow.http)
        await eventually(lambda: state_of(follow) is PeerState.SENDING)


def test_the_back_off_is_jittered_and_bounded() -> None:
    for attempt in range(40):
        assert 0.6 <= jittered(attempt) <= 10.0
