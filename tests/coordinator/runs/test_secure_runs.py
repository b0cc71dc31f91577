"""Secure runs through the real transport, ledger and spool, with small agents in threads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.runs.options import OUTLIER_LIMIT
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.messages.states import RunState
from tests.support.in_process_fleet import Fleet, first_weights, fleet_of, loss_of, some_data
from tests.support.secure_peer import SecurePeer

DATA = [some_data(40 + 10 * seed, seed) for seed in range(4)]


@asynccontextmanager
async def secure_fleet(
    folder: Path, count: int = 3
) -> AsyncIterator[tuple[Fleet, list[SecurePeer]]]:
    async with fleet_of(folder, *DATA[:count]) as fleet:
        pinned = {agent.peer for agent in fleet.agents}
        yield fleet, [SecurePeer(agent, pinned) for agent in fleet.agents]


def start(fleet: Fleet, **spec: Any) -> str:
    return fleet.start(**{"rounds": 2, "quorum": 3, "secure": True, "clip_norm": 10.0, **spec})


async def test_a_secure_run_learns_and_its_ledger_names_each_decision(tmp_path: Path) -> None:
    async with secure_fleet(tmp_path) as (fleet, _):
        run = await fleet.finished(run_id := start(fleet))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, [])
        losses = [
            sum(loss_of(model, data) for data in DATA[:3])
            for model in (first_weights(5), fleet.version(run.head))
        ]
        assert losses[1] < losses[0]
        assert [closed.contributors for closed in run.history] == [
            tuple(sorted(agent.peer for agent in fleet.agents))
        ] * 2
        assert all("loss" in closed.metrics for closed in run.history)
        kinds = [fact.kind for fact in fleet.facts(run_id, run_events.CohortFixed)]
        assert kinds == ["train", "evaluate"] * 2


REFUSED = [
    ({"quorum": 2}, "a quorum of at least 3"),
    ({"mode": "buffered", "buffer": 3}, "peers of a sum train on one version"),
    ({"late": "fold"}, "a masked update belongs to one sum"),
    ({"codec": "topk:0.02"}, "cannot send the codec topk:0.02"),
    ({"codec": "int8", "quorum": 300}, "too few bits are left"),
    ({"strategy": "fedmedian"}, "fedmedian, which compares single updates"),
    ({"strategy": "krum", "strategy_args": {"num_malicious_nodes": 0}}, "compares single updates"),
    ({"strategy": "qfedavg"}, "needs a metric of each peer"),
    ({"strategy": "scaffold"}, "keeps state for each peer"),
    ({"strategy": "fedbn"}, "keeps state for each peer"),
    ({"strategy": "flwr.serverapp.strategy:FedAvg"}, "a custom strategy may need single updates"),
    ({"outlier_limit": 3.0}, "--outlier-limit, which compares single updates"),
]


@pytest.mark.parametrize(("spec", "words"), REFUSED, ids=lambda part: str(part)[:30])
def test_what_needs_single_updates_is_refused_before_the_start(
    spec: dict[str, Any], words: str
) -> None:
    allowed = {"task": "mnist", "rounds": 1, "quorum": 3, "secure": True}
    spec_rules.check(RunSpec(**allowed))
    with pytest.raises(UsageError) as refused:
        spec_rules.check(RunSpec(**(allowed | spec)))
    assert words in refused.value.message
    assert refused.value.hint


def test_the_command_line_chooses_what_a_secure_run_needs() -> None:
    spec = build_order({"task": "mnist", "secure": True, "quorum": 3}).spec
    assert (spec.secure, spec.outlier_limit, spec.clip_norm) == (True, 0.0, 10.0)
    spec_rules.check(spec)
    typed = {"task": "mnist", "secure": True, "quorum": 3, "clip-norm": 2.0, "outlier-limit": 5.0}
    spec = build_order(typed).spec
    assert (spec.outlier_limit, spec.clip_norm) == (5.0, 2.0)
    plain = build_order({"task": "mnist"}).spec
    assert (plain.secure, plain.outlier_limit, plain.clip_norm) == (False, OUTLIER_LIMIT, 0.0)
