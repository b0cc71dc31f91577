"""Complete jobs: a real coordinator and agents in threads, beside training; peers that leave."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.transport.coordinator_client import CoordinatorClient
from coordinator.jobs import output
from coordinator.jobs.input import prepare
from coordinator.jobs.manager import JobManager
from coordinator.jobs.state import Job
from coordinator.remote import inference
from coordinator.remote.api_client import Remote
from coordinator.storage import job_events
from coordinator.storage.job_events import PREFIX, Block, JobSpec, JobState
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.transport.upload_limits import MAX_UPLOADS
from protocols.errors import CannotBeMet, UnknownName, UploadUnneeded, UsageError
from protocols.messages.jobs import ANSWER_PATH, INLINE_MAX_BYTES, ModelRef
from protocols.model import weights
from tests.support.in_process_fleet import (
    Agent,
    Fleet,
    Floats,
    first_weights,
    fleet_of,
    loss_of,
    some_data,
)
from tests.support.waiting import until

THREE = tuple(some_data(20 + 30 * seed, seed) for seed in range(3))
ROWS = 600


pytestmark = pytest.mark.usefixtures("coordinator_home")


def features() -> Floats:
    return np.random.default_rng(7).normal(size=(ROWS, 5)).astype(np.float32)


def scattered(fleet: Fleet, x: Floats, **changed: Any) -> tuple[JobSpec, np.ndarray[Any, Any]]:
    """A job over these rows, and the scores that one machine finds."""
    source = fleet.folder / "rows.csv"
    np.savetxt(source, x, delimiter=",", header="a,b,c,d,e", comments="", fmt="%.9g")
    lane, model = fleet.hub.job_store, first_weights(5, seed=3)
    given = prepare(source, lane.folder, lane.suffix)
    spec = JobSpec(
        kind="scatter",
        task="softmax",
        models=(ModelRef(fleet.hub.weight_store.save(model), 0),),
        input=given.digest,
        suffix=given.suffix,
        blocks=given.blocks,
        **changed,
    )
    return spec, x @ np.asarray(model["w"])[:, 0]


async def ended(fleet: Fleet, job_id: str) -> Job:
    def is_ended() -> bool:
        assert all(agent.failures == [] for agent in fleet.agents)
        return fleet.hub.jobs.find(job_id).ended

    await until(is_ended)
    return fleet.hub.jobs.find(job_id)


def facts_of(fleet: Fleet, job_id: str, kind: type[Any]) -> list[Any]:
    ledger = SqliteLedger(fleet.home / "ledger.db", read_only=True)
    found = [job_events.decode(entry.body) for entry in ledger.entries(PREFIX + job_id)]
    ledger.close()
    return [fact for fact in found if isinstance(fact, kind)]


def merged(fleet: Fleet, job: Job) -> np.ndarray[Any, Any]:
    out = fleet.folder / f"{job.id}.csv"
    assert output.merge(job, fleet.hub.job_store, out) == ROWS
    return np.loadtxt(out, delimiter=",", skiprows=1)


def check(fleet: Fleet, job: Job, scores: np.ndarray[Any, Any]) -> None:
    """Each row once, in order, as one machine would have it; and each unit verified once."""
    assert (job.state, job.verified_rows) == (JobState.FINISHED, ROWS)
    found = merged(fleet, job)
    np.testing.assert_array_equal(found[:, 0], np.arange(ROWS))
    np.testing.assert_allclose(found[:, 1], scores, atol=1e-6)
    verified = [fact.unit for fact in facts_of(fleet, job.id, job_events.UnitVerified)]
    assert sorted(verified) == sorted(job.units)


class Door:
    """Holds up an agent's work of one kind until it is opened; stopping opens it too."""

    def __init__(self, agent: Agent, kind: str = "predict") -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._agent, self._kind = agent, kind
        agent.trainer.before = self._pass

    def _pass(self, kind: str, number: int) -> None:
        if kind == self._kind:
            self.reached.set()
            while not self._open.wait(0.02) and not self._agent.stopping:
                pass

    def open(self) -> None:
        self._open.set()


async def test_rows_are_scattered_and_merged_while_a_run_trains(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run_id = fleet.start(rounds=3, quorum=3)
        spec, scores = scattered(fleet, features())
        job = await ended(fleet, fleet.hub.jobs.start(spec))
        check(fleet, job, scores)
        assert (await fleet.finished(run_id)).round == 3
        did = {fact.peer for fact in facts_of(fleet, job.id, job_events.UnitReturned)}
        assert did == {agent.peer for agent in fleet.agents}
        # Nothing of it is left but what was given and what was found, and then not that.
        folder = fleet.home / "jobs"
        await until(lambda: not list((folder / "spool").iterdir()))
        assert {path.stem for path in (folder / "versions").iterdir()} == job.on_disk
        fleet.hub.jobs.mark_taken(job.id)
        assert list((folder / "versions").iterdir()) == []
        assert fleet.hub.jobs.find(job.id).taken


async def test_an_append_that_hangs_does_not_stop_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        spec, scores = scattered(fleet, features())
        job_id = fleet.hub.jobs.start(spec)
        ledger, hangs, may_end = fleet.hub._ledger, threading.Event(), threading.Event()

        def append(subject: str, bodies: Sequence[bytes]) -> None:
            hangs.set()
            assert may_end.wait(10)
            SqliteLedger.append(ledger, subject, bodies)  # type: ignore[arg-type]

        monkeypatch.setattr(ledger, "is_remote", True)  # as one in PostgreSQL
        monkeypatch.setattr(ledger, "append", append)
        await until(hangs.is_set)
        may_end.set()
        check(fleet, await ended(fleet, job_id), scores)


async def test_only_the_newest_untaken_jobs_keep_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.jobs.manager._MAX_UNTAKEN_JOBS", 1)
    for side in ("agent.clientapp.jobs", "coordinator.jobs.store"):
        monkeypatch.setattr(f"{side}.INLINE_MAX_BYTES", 64)  # so answers are files
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        folder = fleet.home / "jobs" / "versions"
        jobs = []
        for seed in range(3):
            spec, _ = scattered(fleet, features() + seed)
            jobs.append(await ended(fleet, fleet.hub.jobs.start(spec)))
            for path in folder.iterdir():  # long ago
                os.utime(path, (0, 0))
        just_prepared = folder / ("f" * 64 + ".bytes")
        just_prepared.write_bytes(b"a,b\n1,2\n")
        fleet.hub.jobs._sweep()
        assert {path.stem for path in folder.iterdir()} == jobs[-1].on_disk | {just_prepared.stem}

        def asked_again(job: Job) -> str:
            """As `commonweight infer --scatter` looks for what was asked before."""
            fleet.hub.job_store.version_path(job.spec.input).touch()
            remote, model = Remote(fleet.home), job.spec.models[0]
            spec = replace(job.spec, models=(ModelRef(model.digest, 0),))
            try:
                return inference.find_earlier(remote, spec, fleet.hub.job_store)
            finally:
                remote.close()

        assert await asyncio.to_thread(asked_again, jobs[-1]) == jobs[-1].id
        assert await asyncio.to_thread(asked_again, jobs[0]) == "", "its answers are dropped"


async def test_no_row_is_lost_with_a_dead_and_a_slow_peer(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        dead, slow, _ = fleet.agents
        doors = Door(dead), Door(slow)
        spec, scores = scattered(fleet, features())
        job_id = fleet.hub.jobs.start(spec)
        await until(lambda: all(door.reached.is_set() for door in doors))
        dead.stop()
        await until(lambda: dead.peer not in fleet.hub._sessions.eligible())
        # The third does all that is not held up, then the last rows of the slow one as well.
        job = await ended(fleet, job_id)
        check(fleet, job, scores)
        doors[1].open()


async def test_a_restart_repeats_no_verified_unit(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, data in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", data)
            await fleet.online(2)
            door = Door(fleet.agents[0])
            spec, scores = scattered(fleet, features())
            job_id = fleet.hub.jobs.start(spec)
            await until(lambda: door.reached.is_set() and fleet.hub.jobs.find(job_id).verified_rows)
        before = facts_of(fleet, job_id, job_events.UnitVerified)
        door.open()
        async with fleet.up():
            job = await ended(fleet, job_id)
            check(fleet, job, scores)  # no unit is verified twice
            assert facts_of(fleet, job_id, job_events.UnitVerified)[: len(before)] == before
            # The peer that was held up had its answer ready: it was asked again, and worked once.
            assert job.dropped == {}
            await fleet.close()
    finally:
        await fleet.close()


async def test_each_peer_evaluates_on_its_own_rows(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        models = [first_weights(5, seed=seed) for seed in (1, 2)]
        digests = [fleet.hub.weight_store.save(model) for model in models]
        few = min(fleet.agents, key=lambda agent: len(agent.trainer.data.y))
        spec = JobSpec(
            kind="private",
            task="softmax",
            models=tuple(ModelRef(digest, 0) for digest in digests),
            min_group=30,
            settings={"round": 0},
        )
        job = await ended(fleet, fleet.hub.jobs.start(spec))
        (matrix,) = output.matrices(output.scores_of(job))
        for agent in fleet.agents:
            for digest, model in zip(digests, models, strict=True):
                expected = None if agent is few else loss_of(model, agent.trainer.data)
                assert matrix.by_peer[agent.peer].get(digest) == expected
        told = [agent for agent in fleet.agents if agent is not few]
        for digest, model in zip(digests, models, strict=True):
            losses = {agent.peer: loss_of(model, agent.trainer.data) for agent in told}
            rows = [len(agent.trainer.data.y) for agent in told]
            weighted = np.average(list(losses.values()), weights=rows)
            assert matrix.weighted[digest] == pytest.approx(weighted)
            assert matrix.worst[digest] == max((v, k) for k, v in losses.items())[::-1]


async def test_a_job_reaches_peers_that_are_named_by_name_or_by_id(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        first, second, _ = fleet.agents
        digest = fleet.hub.weight_store.save(first_weights(5, seed=1))
        spec = JobSpec(
            kind="private",
            task="softmax",
            models=(ModelRef(digest, 0),),
            peers=(first.machine.name, second.peer, first.peer),
            settings={"round": 0},
        )
        job = await ended(fleet, fleet.hub.jobs.start(spec))
        assert (job.state, job.ended_because) == (JobState.FINISHED, "2 of 2 peers answered")
        assert {peer for unit in job.units.values() for peer in unit.answers} == {
            first.peer,
            second.peer,
        }


async def test_a_job_does_not_wait_for_a_peer_that_is_removed(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        removed = fleet.agents[0]
        door = Door(removed, "evaluate")
        digest = fleet.hub.weight_store.save(first_weights(5, seed=1))
        spec = JobSpec(
            kind="private",
            task="softmax",
            models=(ModelRef(digest, 0),),
            settings={"round": 0},
        )
        job_id = fleet.hub.jobs.start(spec)
        await until(door.reached.is_set)
        await until(lambda: fleet.hub.jobs.find(job_id).verified_rows)
        fleet.hub.registry.remove(removed.peer, "test")
        job = await ended(fleet, job_id)
        assert (job.state, job.ended_because) == (JobState.FINISHED, "1 of 2 peers answered")
        assert "the fleet has no peer with this id" in job.excused[removed.peer]
        door.open()


async def test_a_job_of_an_older_ledger_with_names_instead_of_ids_ends_in_words(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        digest = fleet.hub.weight_store.save(first_weights(5, seed=1))
        spec = JobSpec(
            kind="private", task="softmax", models=(ModelRef(digest, 0),), peers=("agent0",)
        )
        subject = f"{job_events.PREFIX}private-0ddba1"
        fleet.hub._ledger.append(subject, [job_events.encode(job_events.JobStarted(spec, 1.0))])
        jobs = JobManager(fleet.hub.runs._ctx, fleet.hub.job_store, fleet.hub.registry)
        work = asyncio.create_task(jobs.work(resume=True))
        await until(lambda: jobs.find("private-0ddba1").ended)
        work.cancel()
        job = jobs.find("private-0ddba1")
        assert (job.state, job.ended_because) == (JobState.FAILED, "0 of 1 peers answered")
        assert "start the job again" in job.excused["agent0"]


async def test_answers_that_no_job_waits_for_are_not_taken_and_not_kept(tmp_path: Path) -> None:
    """A peer has more answers left over from stopped jobs than it may have uploads."""
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        (agent,) = fleet.agents
        link = agent._open_link()
        bytes_of = [bytes([number]) * (INLINE_MAX_BYTES + 1) for number in range(5)]
        door = Door(agent)
        spec, scores = scattered(fleet, features())
        job_id = fleet.hub.jobs.start(spec)
        await until(door.reached.is_set)
        for number, data in enumerate(bytes_of):
            source = tmp_path / str(number)
            source.write_bytes(data)
            digest = weights.file_digest(source)
            other = CoordinatorClient(agent._credentials)
            await asyncio.to_thread(other.upload, digest, source, ANSWER_PATH)
            other.close()
        folder = fleet.home / "jobs" / "spool"
        assert len(list(folder.iterdir())) == MAX_UPLOADS
        fleet.hub.jobs.stop(job_id)
        await ended(fleet, job_id)
        await until(lambda: not list(folder.iterdir()))
        with pytest.raises(UploadUnneeded):
            await asyncio.to_thread(link.upload, digest, source, ANSWER_PATH)
        door.open()
        job = await ended(fleet, fleet.hub.jobs.start(scattered(fleet, features())[0]))
        check(fleet, job, scores)
        assert list(folder.iterdir()) == []


async def test_peers_whose_owners_refuse_are_excused(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        for agent in fleet.agents:
            agent.owner = type(agent.owner)(jobs_scatter="off")
        spec, _ = scattered(fleet, features())
        job = await ended(fleet, fleet.hub.jobs.start(spec))
        assert job.state is JobState.FAILED
        assert "does not allow predictions for rows of others" in job.ended_because
        for agent in fleet.agents:
            agent.owner = type(agent.owner)(jobs_scatter="on", tasks=("softmax",))
        fleet.hub.jobs.resume(job.id)
        assert (await ended(fleet, job.id)).state is JobState.FINISHED


async def test_impossible_jobs_are_refused(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        spec, _ = scattered(fleet, features())
        start = fleet.hub.jobs.start
        with pytest.raises(UnknownName, match="was deleted"):
            start(JobSpec(kind="private", models=(ModelRef("0" * 64, 0),)))
        with pytest.raises(UsageError, match="a model is needed"):
            start(JobSpec(kind="private"))
        with pytest.raises(UsageError, match="no input"):
            start(JobSpec(kind="scatter", models=spec.models, blocks=(Block(1, 1),)))
        with pytest.raises(CannotBeMet, match="a quorum of 2"):
            start(
                JobSpec(
                    kind="scatter",
                    models=spec.models,
                    quorum=2,
                    blocks=spec.blocks,
                    input=spec.input,
                )
            )
