"""What the uploads of a run leave behind when it ends, however that happens: nothing."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.runs import retention, state
from coordinator.storage import run_events
from coordinator.transport.upload_limits import MAX_UPLOADS
from protocols.errors import UploadUnneeded
from protocols.messages.states import RunState
from protocols.model.weights import Weights
from tests.coordinator.runs.test_loop import Door
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, gradient_step, some_data
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("coordinator_home")

THREE = tuple(some_data(20 + 30 * seed, seed) for seed in range(3))


def spool(fleet: Fleet) -> list[str]:
    root = fleet.home / "spool"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


async def is_idle(fleet: Fleet) -> None:
    await until(lambda: fleet.hub.runs.current is None)


def varied(agent: Agent) -> None:
    """From now on, each training of the agent gives another update."""
    count = iter(range(1, 10_000))
    agent.trainer.step = lambda model, data: gradient_step(model, data, 0.1 / next(count))


def uploads_of(fleet: Fleet, agent: Agent) -> list[str]:
    return [name for name in spool(fleet) if agent.peer in name and not name.endswith(".part")]


@pytest.mark.parametrize(
    "spec",
    [
        {"rounds": 5, "quorum": 2},
        pytest.param({"rounds": 5, "quorum": 2, "codec": "int8"}, marks=pytest.mark.long),
        {"rounds": 5, "mode": "buffered", "buffer": 3},
        {"rounds": 5, "quorum": 2, "late": "fold"},
    ],
)
async def test_a_stopped_run_leaves_nothing_and_does_not_block_the_next_one(
    tmp_path: Path, spec: dict[str, Any]
) -> None:
    """More often than a peer may have uploads, with an update of one peer each time."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        quick, slow = fleet.agents
        varied(quick)
        for _ in range(MAX_UPLOADS + 1):
            door = Door(slow, 1)
            run_id = fleet.start(**spec)
            await until(door.reached.is_set)
            await until(lambda r=run_id: fleet.facts(r, run_events.UpdateAccepted))  # type: ignore[misc]
            assert uploads_of(fleet, quick)
            fleet.hub.runs.stop(run_id)
            await fleet.finished(run_id)
            await is_idle(fleet)
            assert spool(fleet) == []
            door.open()
        run = await fleet.finished(fleet.start(rounds=2, quorum=2))
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run.id) == []
        await is_idle(fleet)
        assert spool(fleet) == []


async def hears_of_its_end(fleet: Fleet, run_id: str) -> bool:
    """True if an agent that works for this run hears with a heartbeat that the run has ended."""
    heard = set[str]()
    link = fleet.agents[1].link
    assert link is not None
    link.working_for, link.on_run_over = lambda: run_id, heard.add
    await asyncio.to_thread(link.heartbeat)
    return heard == {run_id}


async def test_an_update_for_a_stopped_run_is_not_taken(tmp_path: Path) -> None:
    """Neither without a run, nor in the next one, which it does not belong to."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        slow = fleet.agents[1]
        refusals: list[str] = []
        send = slow.send

        def sends(digest: str, path: Path) -> None:
            try:
                send(digest, path)
            except UploadUnneeded as err:
                refusals.append(err.message)
                raise

        slow.send = sends  # type: ignore[method-assign]
        for waits_for_next in (False, True):
            door = Door(slow, 1)
            stopped = fleet.start(rounds=1, quorum=2)
            await until(door.reached.is_set)
            assert not await hears_of_its_end(fleet, stopped)
            fleet.hub.runs.stop(stopped)
            await fleet.finished(stopped)
            await is_idle(fleet)
            assert await hears_of_its_end(fleet, stopped), "so its training can be cancelled"
            following = fleet.start(rounds=1, quorum=2) if waits_for_next else ""
            if following:
                await until(lambda f=following: fleet.hub.weight_store.uploads.run == f)  # type: ignore[misc]
            refusals.clear()
            door.open()
            await until(lambda: refusals)
            assert len(refusals) == 1
            if following:
                assert (await fleet.finished(following)).state is RunState.FINISHED
                assert fleet.refusals(following) == []
        await is_idle(fleet)
        assert spool(fleet) == []


async def test_a_refused_update_is_deleted_with_its_run(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:

        def wrong(model: Weights, data: Any) -> Weights:
            return Weights({name: model[name] for name in sorted(model.schema)[:1]})

        fleet.agents[1].trainer.step = wrong
        run_id = fleet.start(rounds=1, quorum=2)
        await until(lambda: len(fleet.refusals(run_id)) == 1)
        fleet.hub.runs.stop(run_id)
        await fleet.finished(run_id)
        await is_idle(fleet)
        assert spool(fleet) == []


async def test_an_unfinished_run_keeps_its_uploads_over_a_restart_and_others_lose_theirs(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, data in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", data)
            await fleet.online(2)
            door = Door(fleet.agents[1], 1)
            run_id = fleet.start(rounds=1, quorum=2)
            await until(lambda: fleet.facts(run_id, run_events.UpdateAccepted))
            (kept,) = uploads_of(fleet, fleet.agents[0])
        # What an earlier crash, and an older version, have left behind.
        root, strange = fleet.home / "spool", fleet.home / "spool" / "gone-123456"
        strange.mkdir()
        (strange / f"A-{'0' * 64}.safetensors").write_bytes(b"x")
        (root / f"A-{'1' * 64}.safetensors").write_bytes(b"x")
        # An older version kept the accepted update in the folder itself.
        name = Path(kept).name
        (root / kept).replace(root / name)
        async with fleet.up():
            await until(lambda: fleet.hub.runs.current is not None)
            assert [path for path in spool(fleet) if path.endswith(".safetensors")] == [kept]
            door.open()
            run = await fleet.finished(run_id)
            assert run.state is RunState.FINISHED
            assert fleet.refusals(run_id) == []
            assert len(fleet.facts(run_id, run_events.UpdateAccepted)) >= 2
            await is_idle(fleet)
            assert spool(fleet) == []
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_run_that_is_not_continued_leaves_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, data in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", data)
            await fleet.online(2)
            Door(fleet.agents[1], 1)
            run_id = fleet.start(rounds=1, quorum=2)
            await until(lambda: fleet.facts(run_id, run_events.UpdateAccepted))
            assert uploads_of(fleet, fleet.agents[0])
        async with fleet.up(resume=False):
            await until(lambda: fleet.hub.runs.find(run_id).ended)
            assert spool(fleet) == []
            await fleet.close()
    finally:
        await fleet.close()


@pytest.mark.parametrize("resume", [True, False])
async def test_an_ended_run_keeps_no_version_for_a_peer_that_still_trains(
    tmp_path: Path, resume: bool
) -> None:
    fleet = Fleet(tmp_path)

    def keeps_what_it_needs() -> None:
        kept = retention.versions_to_keep(fleet.hub.runs.find(run_id))
        assert {path.stem for path in (fleet.home / "versions").iterdir()} == kept
        assert base not in kept

    try:
        async with fleet.up():
            for number, data in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", data)
            await fleet.online(2)
            varied(fleet.agents[0])
            door = Door(fleet.agents[1], 1)
            run_id = fleet.start(rounds=90, quorum=1, deadline_s=0.2, late="fold", max_staleness=90)
            await until(lambda: len(fleet.facts(run_id, run_events.RoundClosed)) > 5)
            base = fleet.hub.runs.find(run_id).first
            assert fleet.hub.weight_store.has(base)
            if resume:
                fleet.hub.runs.stop(run_id)
                await fleet.finished(run_id)
                await is_idle(fleet)
                keeps_what_it_needs()
            door.open()
        if not resume:
            async with fleet.up(resume=False):
                await until(lambda: fleet.hub.runs.find(run_id).ended)
                keeps_what_it_needs()
                await fleet.close()
    finally:
        await fleet.close()


async def test_a_peer_that_is_late_in_each_round_is_never_refused(tmp_path: Path) -> None:
    """With `late` fold, each of its uploads counts one version later and is then deleted."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        slow = fleet.agents[1]
        for agent in fleet.agents:
            varied(agent)
        run_id = fleet.start(
            rounds=8, quorum=1, deadline_s=0.3, late="fold", max_staleness=10, keep_versions=9
        )
        before = slow.trainer.before

        def dawdle(kind: str, number: int) -> None:
            before(kind, number)
            if kind == "train":
                slow._stopping.wait(0.4)

        slow.trainer.before = dawdle
        most = 0

        def ended() -> bool:
            nonlocal most
            most = max(most, len(uploads_of(fleet, slow)))
            return fleet.hub.runs.find(run_id).ended

        await until(ended)
        run = fleet.hub.runs.find(run_id)
        assert run.state is RunState.FINISHED
        reasons = {reason for _, _, reason in fleet.refusals(run_id)}
        assert reasons <= {"late"}, "its last one may be too late for the run"
        assert most <= MAX_UPLOADS + 2
        await is_idle(fleet)
        assert spool(fleet) == []


def put(fleet: Fleet, agent: Agent, body: bytes) -> int:
    """Upload these bytes in the name of the agent; the status."""
    digest = hashlib.sha256(body).hexdigest()
    path = f"/cw/v1/updates/{digest}"
    headers = agent.machine.headers("PUT", path, digest=digest)
    assert agent.link is not None
    context = agent.link._http_client._tls
    with httpx.Client(base_url=f"https://127.0.0.1:{fleet.port}", verify=context) as http:
        return http.put(path, content=body, headers=headers).status_code


async def test_uploads_in_excess_replace_those_that_do_not_count(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        quick, slow = fleet.agents
        door = Door(slow, 1)
        run_id = fleet.start(rounds=1, quorum=2)
        await until(lambda: fleet.facts(run_id, run_events.UpdateAccepted))
        (counted,) = uploads_of(fleet, quick)
        for number in range(5):
            assert await asyncio.to_thread(put, fleet, quick, b"%d" % number) == 200
            assert counted in uploads_of(fleet, quick)
            assert len(uploads_of(fleet, quick)) <= 1 + MAX_UPLOADS
        newest = hashlib.sha256(b"4").hexdigest()
        assert any(newest in name for name in uploads_of(fleet, quick))
        limits = fleet.hub.transfer.limits
        with limits.keeping({quick.peer}):
            assert await asyncio.to_thread(put, fleet, quick, b"checked meanwhile") == 503
        door.open()
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        await is_idle(fleet)
        assert await asyncio.to_thread(put, fleet, quick, b"after the end") == 410
        assert spool(fleet) == []


async def test_a_removed_peer_that_joins_again_is_not_blocked_by_its_uploads(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        quick, slow = fleet.agents
        door = Door(slow, 1)
        run_id = fleet.start(rounds=2, quorum=2)
        await until(lambda: fleet.facts(run_id, run_events.UpdateAccepted))
        fleet.hub.registry.remove(quick.peer, "test")
        third = fleet.join("agent2", THREE[2])
        await until(lambda: third.peer in fleet.hub._sessions.eligible())
        door.open()
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        await is_idle(fleet)
        assert spool(fleet) == []


def test_only_the_uploads_of_updates_are_accepted_uploads() -> None:
    spec = run_events.RunSpec(task="t", rounds=1)
    update = run_events.Update(digest="d", num_examples=1)
    late = run_events.UpdateAccepted(
        1, "B", run_events.Update(digest="e", base="x", num_examples=1)
    )
    run = state.Run(
        id="r",
        spec=spec,
        updates={"A": update, "C": run_events.Update(num_examples=1)},
        buffer=(late,),
    )
    assert state.accepted_uploads(run) == {("A", "d"), ("B", "e")}
