"""Simulated runs: the digests of a deployed fleet, an ordinary home, stop and resume."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

import commonweight as cw
from agent.data.settings import DataSettings
from agent.trainer.in_process import InProcessTrainer
from commonweight.cli import app
from commonweight.simulation import ray_workers
from commonweight.simulation.plan import Plan, make_keys
from commonweight.simulation.pool import ProcessWorker, Worker
from commonweight.simulation.simulate import Simulation
from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet
from coordinator.remote import recording
from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from coordinator.storage.settings import Keys
from protocols.enrollment import identity
from protocols.errors import HomeError, NotRunning, UsageError
from protocols.local.homes import SIMULATION
from protocols.messages.states import RunState
from protocols.privacy.secagg.keys import CardSecrets
from tests.support.fleet_harness import ROOT
from tests.support.in_process_fleet import fleet_of
from tests.support.softmax_task import part
from tests.support.thread_worker import ThreadWorker

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
            agent.client.training.trainer = InProcessTrainer(data, source=TASK)
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


# --- an ordinary home ---


def keys_of(count: int) -> tuple[bytes, ...]:
    return make_keys(count, seed=1)


def test_the_result_is_a_home_that_is_read_without_a_coordinator(tmp_path: Path) -> None:
    run = cw.simulate(
        TASK, 6, per_round=3, rounds=3, dropout=0.3, workers=1, out=tmp_path / "home", seed=2
    )
    assert run.state == "finished"
    assert [len(one.peers) for one in run.history] == [3, 3, 3]
    assert all(one.bytes_up and one.bytes_down for one in run.history)
    run.export(tmp_path / "model.safetensors", "latest")
    fleet = cw.connect(tmp_path / "home")
    assert [one.id for one in fleet.runs()] == [run.id]
    assert [peer.name for peer in fleet.peers()] == [f"peer{index:05}" for index in range(6)]
    assert [one.digest for one in fleet.run("softmax").rounds()] == [
        one.digest for one in run.history
    ]
    for name in (TASK, "softmax_task.py:Softmax", "Softmax"):
        assert fleet.run(name).id == run.id
    with pytest.raises(NotRunning, match="no coordinator is running over"):
        fleet.train("softmax")
    shown = replayed(tmp_path / "home" / SIMULATION / "recording.cwrec")
    assert [one.digest for one in shown.runs[run.id].rounds] == [one.digest for one in run.history]
    assert len(shown.peers) == 6


def replayed(path: Path) -> Fleet:
    _, lines = recording.read(path)
    first = next(lines).snapshot
    assert first is not None
    for line in lines:
        if line.message is not None:
            reduce(first, line.message, line.message.at)
    return first


def test_the_commands_read_a_stopped_home_and_no_coordinator_serves_a_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    words = ["--peers", "3", "--rounds", "1", "--workers", "1", "--out", str(home), "--json"]
    made = CliRunner().invoke(app, ["simulate", TASK, *words], catch_exceptions=False)
    run = json.loads(made.stdout)["data"]
    assert (run["state"], len(run["history"])) == ("finished", 1)
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(home))
    for command in (["run", "show", run["id"]], ["run", "list"], ["models", "list"]):
        shown = CliRunner().invoke(app, command, catch_exceptions=False)
        assert run["id"] in shown.stdout
    refused = CliRunner().invoke(app, ["up"])
    assert isinstance(refused.exception, UsageError)
    assert "a simulation" in refused.exception.message


# --- stop, resume, losses ---


#: What an update leaves out waits in the peers' folders.
LOSSY = {"codec": "topk:0.2"}


def made_in(home: Path, **fields: Any) -> Simulation:
    spec = RunSpec(task="softmax", **spec_of(**{"quorum": 3, "select": 1.0, "rounds": 4, **fields}))
    secure = bool(fields.get("secure"))
    plan = functools.partial(plan_of, home=home, peers=keys_of(6), secure=secure)
    return Simulation.create(home, spec, plan, dropout=0.2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_in(tmp_path_factory.mktemp("whole") / "home", **LOSSY).run(
        2, make_worker=ThreadWorker
    )


def test_ctrl_c_stops_a_simulation_and_it_continues_with_the_same_digests(
    tmp_path: Path, undisturbed: Run
) -> None:
    def interrupt(run: Run) -> None:
        if len(run.history) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = made_in(tmp_path / "stopped", **LOSSY)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(2, interrupt, ThreadWorker)
    continued = Simulation.open(tmp_path / "stopped")
    assert results(continued.run(2, make_worker=ThreadWorker)) == results(undisturbed)
    with pytest.raises(HomeError, match="in use already"):
        made_in(tmp_path / "stopped")


def test_a_worker_that_is_killed_is_replaced(
    tmp_path: Path, undisturbed: Run, caplog: pytest.LogCaptureFixture
) -> None:
    workers: list[ProcessWorker] = []

    def make_worker(plan: Plan) -> ProcessWorker:
        workers.append(ProcessWorker(plan))
        return workers[-1]

    def kill(run: Run) -> None:
        if len(run.history) == 1:
            os.kill(workers[0].pid, signal.SIGKILL)

    run = made_in(tmp_path / "killed", **LOSSY).run(1, kill, make_worker)
    assert results(run) == results(undisturbed)
    assert "a worker was killed" in caplog.text
    assert [worker.pid for worker in workers] == [0]


def test_the_folder_of_a_killed_worker_on_ray_is_removed_and_that_of_a_running_one_is_not(
    tmp_path: Path,
) -> None:
    old, young = (tmp_path / f"{ray_workers.FOLDER_PREFIX}{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
    lock = "import sys; from pathlib import Path; from protocols.local import homes; "
    lock += (
        "held = homes.lock_home(Path(sys.argv[1]), 'worker'); print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", lock, str(old)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None
        assert actor.stdout.readline()
        os.utime(old, (0.0, 0.0))
        ray_workers.remove_abandoned(tmp_path)
        assert old.exists()
        actor.kill()
        actor.wait(60)
        os.utime(old, (0.0, 0.0))
        ray_workers.remove_abandoned(tmp_path)
    assert not old.exists()
    assert young.exists()


def test_a_secure_run_ends_although_peers_leave(tmp_path: Path) -> None:
    made = made_in(tmp_path / "home", secure=True, clip_norm=10.0, rounds=2, select=0.0)
    assert len(made.run(2, make_worker=ThreadWorker).history) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peers": 0}, "--peers must be"),
        ({"per_round": 11}, "--per-round must be"),
        ({"dropout": 1.0}, "--dropout must be"),
        ({"task": cw.Run}, "is not at the top of a file"),
        ({"owner": {"min_batch": "many"}}, "min_batch must be a whole number"),
        ({"split": "halves"}, "--split is iid, shards or dirichlet:NUMBER"),
    ],
)
def test_wrong_options_are_refused_before_a_home_is_made(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    if "task" in given:
        given = {"task": type("Typed", (), {"__module__": "nowhere"})}
    with pytest.raises(UsageError, match=message):
        cw.simulate(**{"task": TASK, "out": tmp_path / "home", **given})
    assert not (tmp_path / "home").exists()
