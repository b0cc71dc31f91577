"""A few of the real processes' cases: `make faults` plays them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import crashes, job_crashes
from benchmarks.faults.failpoint_names import (
    AGENT_APPS,
    AGENT_JOBS,
    CLUSTER,
    HANDSHAKE,
    JOBS,
    NAMES,
    OF_SECURE_RUNS,
)


def test_every_step_of_a_round_is_a_case() -> None:
    for seed in (1, 2, 3):
        points = [*crashes.coordinator_points(seed), *crashes.agent_points(seed)]
        played = {point.partition(":")[0] for point in points} | {"runs.recalled"}
        of_rounds = (
            NAMES - set(JOBS + AGENT_JOBS + AGENT_APPS + CLUSTER + HANDSHAKE) - OF_SECURE_RUNS
        )
        assert played == {name for name in of_rounds if not name.startswith("trainer.")}


@pytest.mark.long
def test_a_coordinator_killed_in_a_round_loses_nothing(tmp_path: Path) -> None:
    points = ("reply.taken:2", "version.renamed")
    assert crashes.coordinator(tmp_path, [1], points).violations == []


@pytest.mark.long
def test_an_agent_killed_with_its_claim_on_the_way_is_counted_once(tmp_path: Path) -> None:
    assert crashes.agent(tmp_path, [1], ("agent.claim.sending:2",)).violations == []


@pytest.mark.parametrize("kind", job_crashes.KINDS)
def test_every_step_of_a_unit_is_a_case(kind: str) -> None:
    played = {point.partition(":")[0] for point in job_crashes.coordinator_points(kind)}
    assert played == set(JOBS)


def test_work_on_what_is_verified_is_found() -> None:
    ended = {"type": "JobEnded", "state": "finished"}
    leased, verified = {"type": "UnitLeased", "unit": 1}, {"type": "UnitVerified", "unit": 1}
    assert job_crashes.done_again([leased, leased, verified, ended]) == []
    (found,) = job_crashes.done_again([leased, verified, leased, ended])
    assert found == "unit 1 was verified, and then came UnitLeased"
    assert job_crashes.done_again([leased, verified])


@pytest.mark.long
@pytest.mark.parametrize("kind", job_crashes.KINDS)
def test_a_coordinator_killed_in_a_job_loses_nothing(tmp_path: Path, kind: str) -> None:
    points = ("job.recorded.UnitVerified", "job.reply.pulled")
    assert job_crashes.coordinator(tmp_path, kind, points).violations == []
