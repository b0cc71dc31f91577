"""The spool of the job lane holds only what a unit of work can need, and for as long as it can."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.weight_transfer import SessionLost
from coordinator.jobs.store import MAX_ANSWER_BYTES_PER_ROW, MAX_TABLE_HEAD_BYTES
from coordinator.storage.job_events import JobSpec
from protocols.errors import CommonweightError, Unreachable, UploadRefused, UploadUnneeded
from protocols.messages.jobs import ANSWER_PATH, INLINE_MAX_BYTES, ModelRef
from protocols.model import weights
from tests.coordinator.jobs.test_loop import Door, features, scattered
from tests.support.in_process_fleet import Agent, Fleet, first_weights, fleet_of, some_data
from tests.support.waiting import until

TWO = tuple(some_data(20 + 30 * seed, seed) for seed in range(2))
ROWS = 3

pytestmark = [pytest.mark.usefixtures("coordinator_home"), pytest.mark.attack("20.9")]


def spooled(fleet: Fleet) -> list[str]:
    return [path.name for path in (fleet.home / "jobs" / "spool").iterdir()]


async def upload(agent: Agent, folder: Path, number: int, nbytes: int) -> None:
    """Upload an answer of `nbytes` that nobody has signed."""
    source = folder / f"answer-{number}"
    source.write_bytes(bytes([number]) * nbytes)
    link = CoordinatorClient(agent._credentials)
    try:
        digest = weights.file_digest(source)
        await asyncio.to_thread(link.upload, digest, source, ANSWER_PATH)
    finally:
        link.close()


def private(fleet: Fleet, *agents: Agent) -> JobSpec:
    model = fleet.hub.weight_store.save(first_weights(5, seed=3))
    peers = tuple(agent.peer for agent in agents)
    return JobSpec(kind="private", task="softmax", models=(ModelRef(model, 0),), peers=peers)


async def test_a_peer_without_a_unit_stores_nothing(tmp_path: Path) -> None:
    """Attack: a peer uploads 256 MB answers while a job of other peers works.

    The answers to `private` fit into their message, so no upload is taken for them either.
    """
    async with fleet_of(tmp_path, *TWO) as fleet:
        leased, idle = fleet.agents
        door = Door(leased, "evaluate")
        fleet.hub.jobs.start(private(fleet, leased))
        await until(door.reached.is_set)
        for number, agent in enumerate([idle, idle, leased]):
            with pytest.raises(UploadUnneeded):
                await upload(agent, tmp_path, number, INLINE_MAX_BYTES + 1)
        assert spooled(fleet) == []
        door.open()


async def test_an_answer_has_at_most_the_bytes_of_its_unit(tmp_path: Path) -> None:
    """Attack: a peer with a unit of three rows uploads an answer as long as the lane takes."""
    async with fleet_of(tmp_path, TWO[0]) as fleet:
        (agent,) = fleet.agents
        door = Door(agent)
        spec, _ = scattered(fleet, features()[:ROWS])
        fleet.hub.jobs.start(spec)
        await until(door.reached.is_set)
        most = ROWS * MAX_ANSWER_BYTES_PER_ROW + MAX_TABLE_HEAD_BYTES
        with pytest.raises(UploadRefused, match=f"takes at most {most:,}"):
            await upload(agent, tmp_path, 0, most + 1)
        assert spooled(fleet) == []
        await upload(agent, tmp_path, 1, most)
        assert len(spooled(fleet)) == 1
        door.open()


class _CutOff(Exception):
    """Ends an upload in the middle."""


async def leave_half(agent: Agent, folder: Path) -> None:
    """Start an upload and stop in the middle: a `.part` file stays, so that it can be resumed."""
    link = CoordinatorClient(agent._credentials)
    source = folder / "half"
    source.write_bytes(b"h" * 2 * INLINE_MAX_BYTES)
    pieces = link._pieces

    def cut(path: Path, offset: int) -> Iterator[bytes]:
        yield next(pieces(path, offset))[:INLINE_MAX_BYTES]
        raise _CutOff

    link._pieces = cut  # type: ignore[method-assign]
    with pytest.raises(_CutOff):
        await asyncio.to_thread(link.upload, weights.file_digest(source), source, ANSWER_PATH)
    link.close()


async def test_the_answers_of_a_removed_peer_go_at_once(tmp_path: Path) -> None:
    """Attack: a peer fills its share of the spool, is removed, and its files stay."""
    async with fleet_of(tmp_path, TWO[0]) as fleet:
        (agent,) = fleet.agents
        door = Door(agent)
        fleet.hub.jobs.start(scattered(fleet, features())[0])
        await until(door.reached.is_set)
        await upload(agent, tmp_path, 0, INLINE_MAX_BYTES + 1)
        await leave_half(agent, tmp_path)
        await until(lambda: any(name.endswith(".part") for name in spooled(fleet)))
        assert len(spooled(fleet)) == 2
        fleet.hub.registry.remove(agent.peer, "removed by the test")
        await until(lambda: spooled(fleet) == [])
        with pytest.raises((SessionLost, Unreachable)):
            await upload(agent, tmp_path, 1, INLINE_MAX_BYTES + 1)
        assert spooled(fleet) == []
        door.open()


@pytest.mark.long
async def test_the_answers_of_an_ended_job_go_while_others_work(tmp_path: Path) -> None:
    """Attack: a peer's uploads for a job that has ended stay as long as any other job works."""
    async with fleet_of(tmp_path, *TWO) as fleet:
        first, second = fleet.agents
        doors = Door(first), Door(second, "evaluate")
        lasting = fleet.hub.jobs.start(private(fleet, second))
        await until(doors[1].reached.is_set)
        ending = fleet.hub.jobs.start(replace(scattered(fleet, features()[:ROWS])[0], quorum=1))
        await until(doors[0].reached.is_set)
        await upload(first, tmp_path, 0, INLINE_MAX_BYTES + 1)
        assert len(spooled(fleet)) == 1
        fleet.hub.jobs.stop(ending)
        await until(lambda: spooled(fleet) == [])
        assert not fleet.hub.jobs.find(lasting).ended
        with pytest.raises(CommonweightError):
            await upload(first, tmp_path, 1, INLINE_MAX_BYTES + 1)
        assert spooled(fleet) == []
        for door in doors:
            door.open()
