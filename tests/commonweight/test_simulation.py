"""Simulated runs: the digests of a deployed fleet, an ordinary home, stop and resume."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.trainer.in_process import InProcessTrainer
from commonweight.simulation.plan import Plan
from commonweight.simulation.pool import ProcessWorker, ThreadWorker, Worker
from commonweight.simulation.simulate import Simulation
from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from coordinator.storage.settings import Keys
from protocols.enrollment import identity
from protocols.messages.states import RunState
from protocols.privacy.secagg.keys import CardSecrets
from tests.support.fleet_harness import ROOT
from tests.support.in_process_fleet import fleet_of
from tests.support.softmax_task import part

PEERS = 5
TASK = f"{ROOT}/tests/support/softmax_task.py:Softmax"


@pytest.fixture(autouse=True)
def _workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def spec_of(**fields: Any) -> dict[str, Any]:
    return {"rounds": 2, "quorum": PEERS, "seed": 3, "handshake": True, **fields}


async def deployed(
    folder: Path, specs: Iterable[dict[str, Any]]
) -> tuple[list[Run], tuple[bytes, ...]]:
    """Runs of one fleet over TLS, and the keys of its agents."""
    async with fleet_of(folder, *map(part, range(PEERS))) as fleet:
        peers = [agent.peer for agent in fleet.agents]
        for index, agent in enumerate(fleet.agents):
            data = DataSettings(index=index, parts=PEERS)
            assert agent.client is not None
            agent.client._trainer = InProcessTrainer(data, source=TASK)
            agent.owner = replace(agent.owner, trust=dict.fromkeys({*peers} - {agent.peer}, ""))
        runs = [await fleet.finished(fleet.start(**spec)) for spec in specs]
        return runs, tuple(agent.machine.sign_key.private_bytes_raw() for agent in fleet.agents)


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


def simulated(
    home: Path,
    spec: dict[str, Any],
    peers: tuple[bytes, ...],
    make_worker: Callable[[Plan], Worker] = ProcessWorker,
) -> Run:
    plan = functools.partial(plan_of, home=home, peers=peers, secure=spec.get("secure", False))
    made = Simulation.create(home, RunSpec(task="softmax", **spec), plan)
    return made.run(workers=2, make_worker=make_worker)


def results(run: Run) -> list[Any]:
    assert run.state is RunState.FINISHED, run.ended_because
    assert len(run.history) == run.spec.rounds
    return [(one.digest, one.metrics, one.norms, one.contributors) for one in run.history]


@pytest.mark.usefixtures("coordinator_home")
async def test_a_simulated_run_has_the_digests_and_metrics_of_the_deployed_one(
    tmp_path: Path,
) -> None:
    spec = spec_of()
    [real], keys = await deployed(tmp_path, [spec])
    assert results(simulated(tmp_path / "simulated", spec, keys)) == results(real)


OTHERS: dict[str, dict[str, Any]] = {
    "adam": {"strategy": "fedadam", "strategy_args": {"eta": 0.01}, "codec": "int8"},
    "topk": {"codec": "topk:0.2", "rounds": 4},
    "krum": {"strategy": "krum", "strategy_args": {"num_malicious_nodes": 1}},
    "scaffold": {"strategy": "scaffold", "rounds": 4},
    "buffered": {"mode": "buffered", "buffer": PEERS, "quorum": 1, "rounds": 1},
    "sampled": {"quorum": 2, "select": 1.0, "rounds": 5},
}


@pytest.mark.long
@pytest.mark.usefixtures("coordinator_home")
async def test_strategies_and_codecs_give_the_digests_of_the_deployed_runs(
    tmp_path: Path,
) -> None:
    specs = [spec_of(**chosen) for chosen in OTHERS.values()]
    real, keys = await deployed(tmp_path, specs)
    for name, spec, run in zip(OTHERS, specs, real, strict=True):
        assert results(simulated(tmp_path / name, spec, keys)) == results(run), name


@pytest.mark.long
@pytest.mark.usefixtures("coordinator_home")
async def test_a_secure_run_has_the_digests_of_the_deployed_one_if_both_round_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rounding is random and secret. So that this test can set it, the workers are threads.
    monkeypatch.setattr(CardSecrets, "rounding_seed", lambda self, cohort: bytes(32))
    spec = spec_of(secure=True, clip_norm=10.0)
    [real], keys = await deployed(tmp_path, [spec])
    assert results(simulated(tmp_path / "secure", spec, keys, ThreadWorker)) == results(real)
