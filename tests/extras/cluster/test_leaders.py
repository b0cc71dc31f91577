"""Two replicas over one ledger: the leader is lost or replaced, and the run does not notice."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.home.credentials import Credentials
from agent.home.enrollment_file import read_enrollment
from agent.transport.log_replica import LogReplica
from agent.transport.weight_transfer import WeightTransfer
from benchmarks.faults import checker, leaders
from benchmarks.faults.crashes import PEERS
from benchmarks.faults.replicas import Pair, pair
from coordinator.storage.weight_store import WeightStore
from protocols.errors import ExitCode, FormerLeader
from protocols.messages import version_log as wire
from protocols.model.weights import Weights, file_digest
from tests.support import postgres
from tests.support.fault_proxy import Fault, Proxy
from tests.support.fleet_harness import COORDINATOR, HOST, run_program
from tests.support.waiting import wait_for

ROUNDS = 10


@pytest.fixture(scope="module")
def fleet(server: postgres.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("pair"), server) as made:
        made.found(*PEERS)
        yield made


def test_a_home_of_a_replica_has_no_ledger_and_does_not_lead_beside_another(fleet: Pair) -> None:
    second = fleet.folder / fleet.follower
    assert not (second / "ledger.db").exists()
    said = len(fleet.programs[fleet.follower].log)
    fleet.programs[fleet.follower].stop()
    refused = run_program([COORDINATOR, "up"], fleet._env(fleet.follower))
    fleet.start_replica(fleet.follower)
    fleet.until_waits(fleet.follower, said)
    assert refused.returncode == ExitCode.FAILED
    assert "another program writes to this ledger" in refused.stderr


@pytest.mark.parametrize("way", ["kill", "stop", "cut"])
def test_the_loss_of_the_leader_loses_and_doubles_nothing(fleet: Pair, way: str) -> None:
    assert not leaders.lose_leader(fleet, 1, way, "run.recorded.UpdateAccepted").found


def test_a_download_survives_the_replica_that_sends_it(fleet: Pair, tmp_path: Path) -> None:
    model = Weights({"w": np.random.default_rng(7).standard_normal(2_000_000).astype(np.float32)})
    digest = WeightStore(fleet.home).save(model)  # as a run does, beside the coordinator
    version = fleet.home / "versions" / f"{digest}.safetensors"
    size = version.stat().st_size
    shutil.copy(version, fleet.folder / "mirror" / "versions")
    link = WeightTransfer(
        Credentials.load(fleet.folder / "ada", read_enrollment(fleet.folder / "ada"))
    )
    with Proxy(fleet.download_ports[fleet.follower]) as proxy:
        proxy.fault = Fault(bytes_per_s=size / 20)
        link.replicas.use([f"{HOST}:{proxy.port}"])
        target, part = tmp_path / "version", tmp_path / "version.part"
        download = threading.Thread(target=link.download, args=(digest, size, target))
        download.start()
        wait_for(lambda: part.exists() and part.stat().st_size > size / 20, "a part is here")
        process = fleet.programs[fleet.follower].process
        process.kill()
        process.wait()
        download.join(60)
    assert file_digest(target) == digest
    assert link.bytes_down == size, "the coordinator has sent only the rest"
    said = len(fleet.programs[fleet.follower].log)
    fleet.start_replica(fleet.follower)
    fleet.until_waits(fleet.follower, said)


def test_replicas_are_replaced_one_after_the_other_in_a_run(fleet: Pair) -> None:
    undisturbed = fleet.undisturbed(2, ROUNDS)
    run = fleet.order(seed=2, rounds=ROUNDS, quorum=len(PEERS))
    for number in (1, 2):
        fleet.until_versions(run, 2 * number)
        fleet.hand_over()
    assert checker.digests(fleet.outcome(run)) == undisturbed
    assert not fleet.violations(PEERS)


def shown(fleet: Pair, peer: str) -> tuple[int, bytes]:
    """The term that an agent knows, and the newest head that its coordinator has signed."""
    db = sqlite3.connect(fleet.folder / peer / "log.db")
    try:
        ((term,),) = db.execute("SELECT value FROM meta WHERE name = 'term'")
        ((head,),) = db.execute("SELECT head FROM heads ORDER BY size DESC, ledger DESC LIMIT 1")
        return int(term), head
    finally:
        db.close()


def test_an_agent_refuses_the_past_of_a_former_leader(fleet: Pair) -> None:
    """Show what a leader has signed after another one has replaced it."""
    fleet.undisturbed(3)
    term, head = shown(fleet, "ada")
    fleet.hand_over()
    wait_for(lambda: shown(fleet, "ada")[0] > term, "the agent knows the new leader")
    fleet.programs["ada"].stop()
    home = fleet.folder / "copy"
    shutil.copytree(fleet.folder / "ada", home)
    fleet.start("ada")
    enrollment = read_enrollment(home)
    said = list[str]()
    replica = LogReplica(
        *(home, enrollment, enrollment.ca_pem.encode(), lambda start: b""),
        on_fork=said.append,
        on_note=said.append,
    )
    with pytest.raises(FormerLeader, match=f"has term {term}"):
        replica.follow(head, wire.LogPage(start=0, before=wire.START))
    replica.store.close()
    assert not said
