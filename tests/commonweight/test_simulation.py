"""Simulated runs: the digests of a deployed fleet, an ordinary home, stop and resume."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

import commonweight as cw
from agent.data.settings import DataSettings
from agent.trainer.in_process import InProcessTrainer
from commonweight.simulation.plan import Plan
from commonweight.simulation.simulate import Simulation
from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from coordinator.storage.settings import Keys
from protocols.enrollment import identity
from protocols.errors import HomeError, NotRunning, UsageError
from tests.support.fleet_harness import ROOT
from tests.support.in_process_fleet import fleet_of
from tests.support.softmax_task import part

PEERS = 4
TASK = f"{ROOT}/tests/support/softmax_task.py:Softmax"


@pytest.fixture(autouse=True)
def _workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def spec_of(**fields: Any) -> dict[str, Any]:
    return {"rounds": 2, "quorum": PEERS, "seed": 3, "handshake": True, **fields}


async def deployed(folder: Path, spec: dict[str, Any]) -> tuple[Run, tuple[bytes, ...]]:
    """The run of a fleet over TLS, and the keys of its agents."""
    async with fleet_of(folder, *map(part, range(PEERS))) as fleet:
        for index, agent in enumerate(fleet.agents):
            data = DataSettings(index=index, parts=PEERS)
            assert agent.client is not None
            agent.client._trainer = InProcessTrainer(data, source=TASK)
        run = await fleet.finished(fleet.start(**spec))
        return run, tuple(agent.machine.sign_key.private_bytes_raw() for agent in fleet.agents)


def plan_of(keys: Keys, *, home: Path, peers: tuple[bytes, ...], secure: bool = False) -> Plan:
    return Plan(
        home=str(home),
        fleet=keys.fleet,
        coordinator_public=identity.public_bytes(keys.sign_key),
        keys=peers,
        source=TASK,
        task="softmax",
        trusts=secure,
    )


@pytest.mark.usefixtures("coordinator_home")
async def test_a_simulated_run_has_the_digests_and_metrics_of_the_deployed_one(
    tmp_path: Path,
) -> None:
    spec = spec_of()
    real, keys = await deployed(tmp_path, spec)
    home = tmp_path / "simulated"
    plan = functools.partial(plan_of, home=home, peers=keys)
    simulation = Simulation.create(home, RunSpec(task="softmax", **spec), plan)
    run = simulation.run(workers=2)
    assert [one.digest for one in run.history] == [one.digest for one in real.history]
    assert [one.metrics for one in run.history] == [one.metrics for one in real.history]
    assert [one.norms for one in run.history] == [one.norms for one in real.history]
