"""Runs that train while they exchange updates: a round late, and with the same weights whatever
happens meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.clientapp.training import Training
from agent.data.settings import Floors
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.messages.states import RunState
from protocols.model.weights import Weights
from tests.coordinator.runs.test_loop import Door
from tests.support.in_process_fleet import (
    Agent,
    Data,
    Fleet,
    first_weights,
    fleet_of,
    gradient_step,
    some_data,
)
from tests.support.waiting import until

DATA = [some_data(30, 1), some_data(70, 2)]
ROUNDS = 5


def by_the_rule(parts: list[Data], rounds: int, seed: int) -> Weights:
    """Each peer trains from its own weights; its progress of a round, added to the version of that
    round, is its update, and where it goes on from."""
    share = np.array([len(part.y) for part in parts]) / sum(len(part.y) for part in parts)
    version = first_weights(parts[0].x.shape[1], seed)
    own = [version for _ in parts]
    for _ in range(rounds):
        trained = [gradient_step(start, part) for start, part in zip(own, parts, strict=True)]
        own = [
            Weights({n: version[n] + (new[n] - old[n]) for n in version})  # type: ignore[operator]
            for new, old in zip(trained, own, strict=True)
        ]
        means = {
            n: sum(s * np.asarray(w[n], np.float64) for s, w in zip(share, own, strict=True))
            for n in version
        }
        version = Weights({n: np.asarray(mean, np.float32) for n, mean in means.items()})
    return version


def in_background(agent: Agent) -> None:
    """From now on the agent trains ahead in a thread, as outside of tests."""
    client = agent.client
    assert client is not None
    client.training = Training(agent.trainer, client._outbox, Floors(), in_background=True)


async def test_versions_follow_the_rule(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        in_background(fleet.agents[0])
        spec: dict[str, Any] = {"rounds": ROUNDS, "quorum": 2, "seed": 4}
        run = await fleet.finished(fleet.start(**spec, overlap=1))
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run.id) == []
        expected = by_the_rule(DATA, ROUNDS, 4)
        for name in expected:
            np.testing.assert_allclose(fleet.version(run.head)[name], expected[name], atol=1e-5)
        plain = await fleet.finished(fleet.start(**spec))
        assert plain.head != run.head
        for agent in fleet.agents:
            trained = [number for kind, number in agent.trainer.worked if kind == "train"]
            assert trained == [*range(1, ROUNDS + 1)] * 2, "no training is lost, none is extra"


async def test_restarts_in_the_middle_change_nothing(tmp_path: Path) -> None:
    fleet, spec = Fleet(tmp_path), {"rounds": 4, "quorum": 2, "seed": 21, "overlap": 1}
    try:
        async with fleet.up():
            for number, part in enumerate(DATA):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            undisturbed = await fleet.finished(fleet.start(**spec))
            held = Door(fleet.agents[1], 3, "train")
            in_background(fleet.agents[0])
            run_id = fleet.start(**spec)
            await until(held.reached.is_set)
        in_background(fleet.agents[0])  # what it trains in the background is lost
        async with fleet.up():
            held.open()
            run = await fleet.finished(run_id)
            assert [closed.digest for closed in run.history] == [
                closed.digest for closed in undisturbed.history
            ]
            await fleet.close()
    finally:
        await fleet.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "buffered", "buffer": 2}, "--overlap cannot be used with --mode buffered"),
        ({"late": "fold"}, "an older version"),
        ({"secure": True, "quorum": 3}, "--secure cannot be used with --overlap"),
        ({"dp_epsilon": 3.0}, "--dp cannot be used with --overlap"),
        ({"strategy": "scaffold"}, "corrections"),
        ({"overlap": 2}, "--overlap must be 0 or 1"),
    ],
    ids=lambda part: str(part)[:24],
)
def test_what_cannot_be_combined_is_refused_before_the_start(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        spec_rules.check(RunSpec(**({"task": "mnist", "rounds": 3, "overlap": 1} | fields)))


@pytest.mark.parametrize("strategy", ["fedavg", "diloco", "krum"])
def test_it_works_with_updates_that_are_changes_of_weights(strategy: str) -> None:
    for codec in ("fp32", "int8", "sparse2:64"):
        quorum = 5 if strategy == "krum" else 2
        spec_rules.check(
            RunSpec(
                task="mnist", rounds=3, overlap=1, strategy=strategy, codec=codec, quorum=quorum
            )
        )
