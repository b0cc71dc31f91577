"""A simulation on two nodes of Ray that share no folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

import commonweight as cw
from commonweight.simulation import ray_workers
from commonweight.simulation.peer import Answer, Job
from tests.support.fleet_harness import ROOT

TASK = f"{ROOT}/tests/support/softmax_task.py:Softmax"
OPTIONS: dict[str, Any] = {
    "per_round": 4,
    "rounds": 5,
    "codec": "topk:0.2",
    "strategy": "scaffold",
    "seed": 3,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield made
    finally:
        made.shutdown()


def actor_folders() -> Iterator[Path]:
    return Path(tempfile.gettempdir()).glob(f"{ray_workers.FOLDER_PREFIX}*")


def digests(run: cw.Run) -> list[str]:
    return [one.digest for one in run.history]


def test_on_two_nodes_a_run_has_the_digests_of_one_machine_also_if_a_node_is_lost(
    tmp_path: Path,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    here = cw.simulate(TASK, 8, workers=2, out=tmp_path / "here", **OPTIONS)
    folders = set(actor_folders())
    there = cw.simulate(TASK, 8, ray=cluster.address, out=tmp_path / "there", **OPTIONS)
    assert digests(there) == digests(here)
    assert set(actor_folders()) <= folders

    answer, answered = ray_workers.RayWorker.answer, list[int]()

    async def lose_a_node(self: ray_workers.RayWorker, jobs: Sequence[Job]) -> list[Answer]:
        answered.extend(job.index for job in jobs)
        if len(nodes) == 2 and len(answered) >= 30:  # the other one works on alone
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        return await answer(self, jobs)

    monkeypatch.setattr(ray_workers.RayWorker, "answer", lose_a_node)
    lost = cw.simulate(TASK, 8, ray=cluster.address, out=tmp_path / "lost", **OPTIONS)
    assert "a worker on Ray was lost" in caplog.text
    assert digests(lost) == digests(here)
