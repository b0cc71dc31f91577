"""Runs of trees through the real transport, ledger and spool, with agents in threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.policy.consent import Consent
from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.tables.trees import layout
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data
from tests.support.secure_fleet import trust_each_other
from tests.support.tree_peers import Array, Forest, grow
from tests.support.waiting import until

FOREST = Forest.of(5, trees=2, depth=3, bins=8, min_weight=0.5)
PARTS = [some_data(50, 1), some_data(70, 2), some_data(40, 3)]
SPEC: dict[str, Any] = {
    "task": "tabular",
    "rounds": 1 + 2 * 3,
    "quorum": 3,
    "strategy": "trees",
    "codec": "sums",
    "settings": {"target": "y", "model": "trees"},
    "evaluate_every": 3,
}


def plant(fleet: Fleet, *, masked: bool = False) -> None:
    """Give each agent rows for trees."""
    for agent in fleet.agents:
        agent.owner = replace(agent.owner, tasks=("*",), consents={"*": Consent(columns=("*",))})
        _plant(agent, masked)


def _plant(agent: Agent, masked: bool) -> None:
    data = agent.trainer.data
    rows = FOREST.rows(data.x, (data.y > 0).astype(np.int64))

    def sums(model: Weights, _: Any) -> Weights:
        at, numbers = layout.read(model, FOREST.shape)
        return Weights({"sums": rows.sums(model, at, numbers, masked=masked)})

    agent.trainer.step = sums
    agent.trainer.first = lambda seed: Weights(FOREST.first())
    agent.trainer.loss = lambda model, _: float(model["at"][0])


def start(fleet: Fleet, **spec: Any) -> str:
    return fleet.hub.runs.start(RunSpec(**SPEC | spec), "")


def of_one_peer(*, masked: bool) -> str:
    """The digest of the trees of one peer with the rows of all."""
    x = np.concatenate([part.x for part in PARTS])
    y = np.concatenate([part.y for part in PARTS])
    whole = FOREST.rows(x, (y > 0).astype(np.int64))
    return weights.digest(Weights(grow(FOREST, [whole], [len(y)], masked=masked)))


@pytest.mark.parametrize("secure", [False, True])
async def test_a_fleet_grows_the_trees_of_one_peer_with_all_rows(
    tmp_path: Path, secure: bool
) -> None:
    async with fleet_of(tmp_path, *PARTS) as fleet:
        plant(fleet, masked=secure)
        trust_each_other(fleet)
        run = await fleet.finished(run_id := start(fleet, secure=secure))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, []), run.ended_because
        assert run.head == of_one_peer(masked=secure)
        evaluated = [closed.round for closed in run.history if closed.metrics]
        assert evaluated == [1, 4, 7]
        assert run.history[-1].metrics["loss"] == 2.0


async def test_a_restart_in_a_tree_changes_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(PARTS):
                fleet.join(f"agent{number}", part)
            await fleet.online(3)
            plant(fleet)
            run_id = start(fleet)
            await until(lambda: len(fleet.hub.runs.find(run_id).history) >= 3)
        async with fleet.up():
            run = await fleet.finished(run_id)
            assert run.head == of_one_peer(masked=False)
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_peer_that_lies_is_refused_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *PARTS) as fleet:
        plant(fleet)
        liar = fleet.agents[0]
        honest = liar.trainer.step

        def lie(model: Weights, data: Any) -> Weights:
            made: Array = np.asarray(honest(model, data)["sums"])
            return Weights({"sums": made * (1000 if liar.trainer.worked[-1][1] == 2 else 1)})

        liar.trainer.step = lie
        run = await fleet.finished(run_id := start(fleet, quorum=2))
        assert fleet.refusals(run_id) == [(2, liar.peer, "bad sums")]
        assert run.state is RunState.FINISHED
        assert run.history[1].contributors == tuple(
            sorted(agent.peer for agent in fleet.agents[1:])
        )
        # In round 3 it is back, so the first tree has no second level; the second tree has.
        version = fleet.version(run.head)
        assert (version["feature"][0, 0, 1:] == -1).all()
        assert (version["feature"][1, 0, 1:] >= 0).any()


def test_run_start_sets_what_trees_need() -> None:
    typed = {"task": "tabular", "target": "y", "set": ("model=trees", "trees=40", "depth=4")}
    spec = build_order(typed).spec
    assert (spec.strategy, spec.codec, spec.rounds, spec.outlier_limit) == (
        *("trees", "sums", 161, 0.0),
    )
    assert spec.evaluate_every == 4
    assert build_order({**typed, "set": ("model=trees",)}).spec.rounds == 1801
    spec_rules.check(spec)
    spec_rules.check(build_order({**typed, "secure": True, "quorum": 3}).spec)
    assert build_order({**typed, "rounds": 5}).spec.rounds == 5
    with pytest.raises(UsageError, match="--codec"):
        build_order({**typed, "codec": "int8"})
    with pytest.raises(UsageError, match="whole numbers"):
        build_order({**typed, "set": ("model=trees", "trees=x")})


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"strategy": "fedavg"}, "strategy trees"),
        ({"task": "mnist", "settings": {}}, "model is trees"),
        ({"outlier_limit": 3.0}, "--outlier-limit"),
        ({"late": "fold"}, "--late fold"),
        ({"select": 1.2}, "--select"),
        ({"dp_epsilon": 3.0}, "--dp"),
        ({"weighting": "equal"}, "--weighting"),
        ({"codec": "fp32"}, "no --codec"),
    ],
)
def test_what_trees_cannot_be_combined_with(spec: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        spec_rules.check(RunSpec(**SPEC | spec))
