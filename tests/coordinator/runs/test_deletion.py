"""Deleted runs: which files go, which stay because somebody needs them, and what is remembered."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator.runs.deletion import Deletion
from coordinator.storage import run_events, versions
from coordinator.storage.job_events import JobSpec
from coordinator.storage.run_events import RunSpec
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import CannotBeMet, UnknownName
from protocols.messages.jobs import ModelRef
from protocols.messages.states import RunState
from tests.support.fleet_harness import COORDINATOR, environment, run_program
from tests.support.in_process_fleet import Fleet, first_weights, fleet_of, some_data, until

TWO = tuple(some_data(20 + 30 * seed, seed) for seed in range(2))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))


def on_disk(fleet: Fleet) -> set[str]:
    """Names of the versions and states."""
    folders = (fleet.home / "versions", fleet.home / "states")
    return {path.name for folder in folders for path in folder.iterdir()}


def nbytes_on_disk(fleet: Fleet) -> int:
    folders = (fleet.home / "versions", fleet.home / "states")
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


async def ended(fleet: Fleet, **spec: Any) -> str:
    """A run that has ended; its id."""
    run_id = fleet.start(**spec)
    await fleet.finished(run_id)
    await until(lambda: fleet.hub.runs.current is None)
    return run_id


async def test_a_deleted_run_leaves_its_record_and_nothing_else(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(TWO):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            other = await ended(fleet, rounds=1, quorum=2, seed=1)
            before, bytes_before = on_disk(fleet), nbytes_on_disk(fleet)
            deleted = await ended(fleet, rounds=3, quorum=2, seed=2, strategy="fedadam")
            there, bytes_there = on_disk(fleet), nbytes_on_disk(fleet)
            preview = fleet.hub.runs.deletion(deleted)
            assert on_disk(fleet) == there
            assert deleted in fleet.hub.fleet.runs
            assert fleet.hub.runs.delete(deleted) == preview
            assert deleted not in fleet.hub.fleet.runs, "an open monitor does not show it any more"
            gone = {f"{digest}.safetensors" for digest in (*preview.versions, *preview.states)}
            assert {name for name in there - before if name.endswith(".safetensors")} == gone
            assert preview.states
            assert (on_disk(fleet), preview.nbytes) == (before, bytes_there - bytes_before)
            with pytest.raises(UnknownName):
                fleet.hub.runs.find(deleted)
            assert len(fleet.facts(deleted, run_events.RoundClosed)) == 3
            (fact,) = fleet.facts(deleted, run_events.RunDeleted)
            assert (fact.versions, fact.nbytes) == (preview.versions, preview.nbytes)
        async with fleet.up():
            assert [run.id for run in fleet.hub.runs.all()] == [other]
            assert deleted not in fleet.hub.fleet.runs
            assert on_disk(fleet) == before
            fleet.hub.runs.delete(other)
            assert on_disk(fleet) == set()
        assert SqliteLedger(fleet.home / "ledger.db", read_only=True).verify() is None
    finally:
        await fleet.close()


async def test_a_run_that_has_not_ended_is_not_deleted(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *TWO[:1]) as fleet:
        held = asyncio.Event()
        fleet.agents[0].trainer.before = lambda kind, number: until_set(fleet, held)
        running, queued = (fleet.start(rounds=1, quorum=1) for _ in range(2))
        await until(lambda: fleet.hub.runs.current is not None)
        for run_id in (running, queued):
            with pytest.raises(CannotBeMet, match="has not ended"):
                fleet.hub.runs.delete(run_id)
        with pytest.raises(UnknownName):
            fleet.hub.runs.delete("nothing")
        fleet.hub.runs.stop(queued)
        assert fleet.hub.runs.delete(queued) == Deletion(run=queued)
        held.set()
        assert (await fleet.finished(running)).state is RunState.FINISHED


def until_set(fleet: Fleet, event: asyncio.Event) -> None:
    while not event.is_set() and not fleet.agents[0].stopping:
        time.sleep(0.01)


async def test_versions_that_other_runs_keep_stay(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *TWO) as fleet:
        first = await ended(fleet, rounds=2, quorum=2)
        head = fleet.hub.runs.find(first).head
        second = fleet.hub.runs.start(RunSpec(task="softmax", rounds=1, quorum=2), head)
        deletion = fleet.hub.runs.delete(first)
        assert (deletion.shared, head in deletion.versions) == ((head,), False)
        run = await fleet.finished(second)
        assert (run.state, run.first) == (RunState.FINISHED, head)
        await until(lambda: fleet.hub.runs.current is None)
        fleet.hub.runs.delete(second)
        assert on_disk(fleet) == set()


async def test_a_version_that_a_job_uses_is_deleted_when_the_job_has_ended(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(TWO):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            run_id = await ended(fleet, rounds=1, quorum=2)
            head = fleet.hub.runs.find(run_id).head
            await fleet.close()  # no agent answers the job
            spec = JobSpec(
                kind="private",
                task="softmax",
                models=(ModelRef(head, 0),),
                peers=tuple(agent.peer for agent in fleet.agents),
                settings={"round": 0},
            )
            job = fleet.hub.jobs.start(spec)
            assert fleet.hub.runs.delete(run_id).in_use == (head,)
            assert fleet.hub.weight_store.has(head)
        assert fleet.hub.weight_store.has(head), "the job goes on after the restart"
        async with fleet.up():
            await until(lambda: fleet.hub.jobs.is_working)
            assert fleet.hub.weight_store.has(head)
            fleet.hub.jobs.stop(job)
            await until(lambda: not fleet.hub.weight_store.has(head))
            with pytest.raises(UnknownName, match="was deleted"):
                fleet.hub.jobs.resume(job)
    finally:
        await fleet.close()


async def test_what_a_crash_left_of_a_deleted_run_is_deleted_at_the_next_start(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(TWO):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            run_id = await ended(fleet, rounds=2, quorum=2, seed=4)
            model = fleet.version(fleet.hub.runs.find(run_id).head)
            fleet.hub.runs.delete(run_id)
            fleet.hub.weight_store.save(model)
            other = fleet.hub.weight_store.save(first_weights(5, seed=9))
        async with fleet.up():
            await until(lambda: on_disk(fleet) == {f"{other}.safetensors"})
    finally:
        await fleet.close()


async def test_a_run_that_is_just_making_the_same_version_does_not_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(tmp_path, *TWO) as fleet:
        spec = {"rounds": 2, "quorum": 2, "seed": 3, "keep_versions": 2}
        first = await ended(fleet, **spec)
        loop, deleted = asyncio.get_running_loop(), []

        def delete(name: str) -> None:
            """The file is there, and the ledger does not name it yet."""
            if name == "version.renamed" and not deleted:

                async def now() -> None:
                    deleted.append(fleet.hub.runs.delete(first))

                asyncio.run_coroutine_threadsafe(now(), loop).result()

        monkeypatch.setattr(versions, "failpoint", delete)
        run = await fleet.finished(fleet.start(**spec))
        assert run.state is RunState.FINISHED
        assert deleted[0].shared
        assert fleet.hub.weight_store.has(run.history[0].digest)


async def test_the_command_shows_what_goes_and_asks(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *TWO) as fleet:
        env = environment(tmp_path, COMMONWEIGHT_HOME=str(fleet.home))

        async def delete(*words: str) -> Any:
            command = [COORDINATOR, "run", "delete", *words]
            return await asyncio.to_thread(run_program, command, env)

        run_id = await ended(fleet, rounds=1, quorum=2)
        stopped = await asyncio.to_thread(run_program, [COORDINATOR, "run", "stop", run_id], env)
        assert stopped.stderr == f"{run_id} has ended already: finished\n"
        there = on_disk(fleet)
        asked = await delete(run_id)
        assert asked.returncode == 2
        assert f"{run_id}: 2 versions and 0 strategy states, 0.0 MB in all" in asked.stderr
        assert f"commonweight run delete {run_id} --yes" in asked.stderr
        assert on_disk(fleet) == there
        done = await delete(run_id, "--yes", "--json")
        assert done.returncode == 0
        told = json.loads(done.stdout)
        assert (told["status"], told["data"]["run"]) == ("ok", run_id)
        assert len(told["data"]["versions"]) == 2
        assert on_disk(fleet) == set()
        again = await delete(run_id, "--yes")
        assert (again.returncode, f"no run '{run_id}'" in again.stderr) == (2, True)
        for agent in fleet.agents:
            agent.stop()
        await fleet.online(0)
        waiting = fleet.start(rounds=1, quorum=2)
        refused = await delete(waiting, "--yes", "--json")
        assert refused.returncode == 2
        assert json.loads(refused.stdout)["error"]["hint"] == f"commonweight run stop {waiting}"
