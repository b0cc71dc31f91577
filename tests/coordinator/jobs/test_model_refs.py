"""Which versions a job takes."""

from __future__ import annotations

import pytest

from coordinator.jobs import model_refs
from coordinator.runs.state import Round, Run
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError

DIGEST = "ab" * 32


def run_of(strategy: str) -> Run:
    spec = RunSpec(task="ping", rounds=1, strategy=strategy)
    closed = Round(round=1, digest=DIGEST)
    return Run(id=f"ping-{strategy}", spec=spec, head=DIGEST, best=closed, history=(closed,))


def test_a_run_whose_peers_keep_layers_has_no_model_for_a_job() -> None:
    runs = [run_of("fedavg"), run_of("fedbn")]
    assert model_refs.resolve(runs, ["ping-fedavg"]).models[0].digest == DIGEST
    with pytest.raises(
        UsageError, match=r"the layers \*norm\* of run ping-fedbn stay on each peer"
    ):
        model_refs.resolve(runs, ["ping-fedbn"])
