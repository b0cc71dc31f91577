"""Jobs whose peers lack their owners' consent: they wait, say for whom, and go on when it comes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from coordinator.jobs import loop, scheduler
from coordinator.jobs import state as jobs
from coordinator.jobs.scheduler import Availability
from coordinator.storage import job_events
from coordinator.storage.job_events import Block, JobSpec, JobState
from protocols.messages.jobs import ModelRef
from tests.coordinator.jobs.test_loop import ended, facts_of, features, scattered
from tests.coordinator.runs.test_consent import FORBIDDEN, UNDECIDED, decide
from tests.support.in_process_fleet import first_weights, fleet_of, some_data
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("coordinator_home", "no_long_waits")


async def test_a_job_continues_when_the_owner_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_RETRY_S", 0.01)
    async with fleet_of(tmp_path, some_data(20, 0), some_data(20, 1)) as site:
        first, second = site.agents
        allowed = replace(first.owner, jobs_private_models=("*",))
        first.owner, second.owner = allowed, UNDECIDED
        model = ModelRef(site.hub.weight_store.save(first_weights(5, seed=3)), 0)
        spec = JobSpec(kind="private", task="softmax", models=(model,), min_group=1)
        job_id = site.hub.jobs.start(spec)
        shown = site.hub.fleet.peers[second.peer]
        await until(lambda: shown.awaits_consent == "softmax")
        assert site.hub.jobs.find(job_id).excused == {}
        for _ in range(2):  # it says so, and nothing is decided
            asked = len(facts_of(site, job_id, job_events.LeaseEnded))
            decide(second, UNDECIDED)
            await until(
                lambda asked=asked: len(facts_of(site, job_id, job_events.LeaseEnded)) > asked
            )
        decide(second, allowed)
        job = await ended(site, job_id)
        assert job.ended_because == "2 of 2 peers answered"
        await until(lambda: shown.awaits_consent == "")
        # An owner who says no, and a job that ends while another has not decided.
        first.owner = second.owner = UNDECIDED
        job_id = site.hub.jobs.start(spec)
        await until(lambda: all(site.hub.jobs.awaits(one.peer) for one in site.agents))
        decide(first, FORBIDDEN)
        await until(lambda: first.peer in site.hub.jobs.find(job_id).excused)
        working = site.hub.jobs._loops[job_id]
        working._ends_at = 0.0  # as after its deadline
        working.changed.set()
        job = await ended(site, job_id)
        assert "forbids the task" in job.excused[first.peer]
        assert "has not allowed the task 'softmax' yet" in job.excused[second.peer]
        assert job.state is JobState.FAILED


async def test_rows_do_not_wait_for_a_removed_peer_whose_owner_has_not_decided(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, some_data(20, 0), some_data(20, 1)) as site:
        first, second = site.agents
        first.owner = replace(FORBIDDEN, jobs_scatter="on")
        second.owner = replace(UNDECIDED, jobs_scatter="on")
        spec, _ = scattered(site, features())
        job_id = site.hub.jobs.start(spec)
        await until(lambda: site.hub.jobs.awaits(second.peer))
        await until(lambda: first.peer in site.hub.jobs.find(job_id).excused)
        site.hub.registry.remove(second.peer, "test")
        job = await ended(site, job_id)
        assert job.state is JobState.FAILED
        assert "no peer can do it" in job.ended_because


async def test_rows_do_not_wait_for_a_peer_that_went_away_without_a_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RECONNECT_TIMEOUT_S", 0.2)
    async with fleet_of(tmp_path, some_data(20, 0), some_data(20, 1)) as site:
        first, second = site.agents
        first.owner = replace(FORBIDDEN, jobs_scatter="on")
        second.owner = replace(UNDECIDED, jobs_scatter="on")
        spec, _ = scattered(site, features())
        job_id = site.hub.jobs.start(spec)
        await until(lambda: site.hub.jobs.awaits(second.peer))
        await until(lambda: first.peer in site.hub.jobs.find(job_id).excused)
        await asyncio.sleep(0.4)
        assert not site.hub.jobs.find(job_id).ended, "a peer that is online is waited for"
        second.stop()
        site.hub._polls._long_polls.wake(second.peer)
        job = await ended(site, job_id)
        assert job.state is JobState.FAILED
        assert "no peer can do it" in job.ended_because


def test_rows_wait_for_a_peer_whose_owner_has_not_decided() -> None:
    """A job over rows does not fail while an owner may still allow it."""
    job = jobs.started("job", JobSpec(kind="scatter", blocks=(Block(10, 1),)))
    job = jobs.apply(job, job_events.PeerExcused("bob", "a broken disk"))
    for deserted, eligible in ((False, ("bob",)), (True, ())):
        view = Availability(frozenset(eligible), deserted=deserted)
        assert isinstance(scheduler.decide(job, view)[0], job_events.JobEnded)
        assert scheduler.decide(job, view._replace(awaits_consent=True)) == []
