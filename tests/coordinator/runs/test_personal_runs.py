"""SCAFFOLD and FedBN over whole runs: a real coordinator, agents and the trainer's own code."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks import registry
from agent.tasks.work import Done, Init, Train, Work
from agent.trainer.in_process import InProcessTrainer
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError, UsageError
from protocols.messages.states import RunState
from protocols.model import personalization, weights
from protocols.model.weights import Weights
from tests.support.in_process_fleet import Data, Fleet, first_weights, fleet_of, gradient_step
from tests.support.softmax_task import FEATURES, NAME, SIZES, part

OPTIONS = pytest.mark.parametrize("option", [1, 2, 3])
PARTS = [part(index) for index in range(len(SIZES))]
UNION = Data(*(np.concatenate(arrays) for arrays in zip(*PARTS, strict=True)))


@pytest.fixture(autouse=True)
def _task(coordinator_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "softmax", NAME)


@asynccontextmanager
async def trainers(folder: Path) -> AsyncIterator[Fleet]:
    async with fleet_of(folder, *PARTS) as fleet:
        for index, agent in enumerate(fleet.agents):
            agent.client.training.trainer = InProcessTrainer(DataSettings(index=index))  # type: ignore[union-attr]
        yield fleet


def model_of(fleet: Fleet, digest: str) -> Weights:
    return personalization.without_controls(fleet.version(digest))


def kept(fleet: Fleet) -> list[Weights]:
    """What each agent keeps for itself."""
    folders = [agent._folder / "personal" for agent in fleet.agents]
    return [weights.load(next(iter(folder.glob("*.kept")))) for folder in folders]


async def finished(fleet: Fleet, **spec: Any) -> Any:
    run = await fleet.finished(fleet.start(quorum=3, **spec))
    assert run.state is RunState.FINISHED, run.ended_because
    assert fleet.refusals(run.id) == []
    return run


@OPTIONS
async def test_scaffold_with_one_step_is_gradient_descent_on_all_data(
    tmp_path: Path, option: int
) -> None:
    async with trainers(tmp_path) as fleet:
        run = await finished(
            fleet, rounds=5, seed=11, strategy="scaffold", strategy_args={"option": option}
        )
        expected = first_weights(FEATURES, 11)
        for _ in range(5):
            expected = gradient_step(expected, UNION)
        found = model_of(fleet, run.head)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)


@OPTIONS
async def test_scaffold_goes_where_fedavg_is_led_astray(tmp_path: Path, option: int) -> None:
    """Many local steps on unlike data: FedAvg stands still where the gradient of all is not 0."""
    async with trainers(tmp_path) as fleet:
        common: dict[str, Any] = {"rounds": 20, "settings": {"steps": 10, "lr": 0.05}}
        plain = await finished(fleet, **common)
        args = {"option": option}
        steered = await finished(fleet, strategy="scaffold", strategy_args=args, **common)
        assert slope(model_of(fleet, steered.head)) < slope(model_of(fleet, plain.head)) / 3


def slope(model: Weights) -> float:
    """The norm of the loss's gradient over all data."""
    after = gradient_step(model, UNION, 1.0)
    squares = (np.square(np.subtract(model[name], after[name])).sum() for name in model)
    return float(sum(squares)) ** 0.5


@pytest.mark.parametrize(("option", "control"), [(2, "control:"), (3, "control:=")])
async def test_the_shared_control_is_the_mean_of_the_peers_own(
    tmp_path: Path, option: int, control: str
) -> None:
    async with trainers(tmp_path) as fleet:
        args = {"option": option}
        run = await finished(
            fleet, rounds=3, strategy="scaffold", strategy_args=args, settings={"steps": 4}
        )
        version, own = fleet.version(run.head), kept(fleet)
        assert set(version) == {"w", "b", f"{control}w", f"{control}b"}
        for name in (f"{control}w", f"{control}b"):
            share = np.array(SIZES) / sum(SIZES)
            mean = np.tensordot(share, np.stack([np.asarray(o[name]) for o in own]), 1)
            assert np.abs(mean).max() > 1e-3
            np.testing.assert_allclose(version[name], mean, rtol=0, atol=1e-6)


async def test_control_variates_travel_coded_and_begin_with_a_model_of_ones_own(
    tmp_path: Path,
) -> None:
    async with trainers(tmp_path) as fleet:
        digest = fleet.hub.weight_store.save(first_weights(FEATURES, 4))
        spec = RunSpec(task="softmax", rounds=2, quorum=3, strategy="scaffold", codec="int8")
        run = await fleet.finished(fleet.hub.runs.start(spec, digest))
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run.id) == []
        assert np.asarray(fleet.version(run.head)["control:w"]).any()


async def test_controls_that_the_coordinator_makes_cost_no_bytes(tmp_path: Path) -> None:
    """With the codec of one bit too: the change of the weights is all that an update holds."""
    async with trainers(tmp_path) as fleet:
        spec: dict[str, Any] = {"rounds": 2, "settings": {"steps": 4}, "codec": "sign"}
        plain = await finished(fleet, **spec)
        args = {"option": 3}
        steered = await finished(fleet, strategy="scaffold", strategy_args=args, **spec)
        assert [r.bytes_up for r in steered.history] == [r.bytes_up for r in plain.history]
        assert np.asarray(fleet.version(steered.head)["control:=w"]).any()


class Liar(InProcessTrainer):
    """Tells that it has gone next to nowhere, so that what follows from that is infinite."""

    def run(self, work: Work) -> Done:
        done = super().run(work)
        if not isinstance(work, Train):
            return done
        return replace(done, metrics={**done.metrics, personalization.LR_TIMES_STEPS: 1e-300})


async def test_no_path_makes_infinite_controls(tmp_path: Path) -> None:
    async with trainers(tmp_path) as fleet:
        fleet.agents[0].client.training.trainer = Liar(DataSettings(index=0))  # type: ignore[union-attr]
        spec: dict[str, Any] = {"strategy": "scaffold", "strategy_args": {"option": 3}}
        run = await fleet.finished(fleet.start(quorum=2, rounds=2, deadline_s=5.0, **spec))
        assert run.state is RunState.FINISHED, run.ended_because
        liar = fleet.agents[0].peer
        assert fleet.refusals(run.id) == [(n, liar, "bad metrics") for n in (1, 2)]
        version = fleet.version(run.head)
        assert all(np.isfinite(version[name]).all() for name in version)


async def test_layers_that_stay_at_home_are_in_no_version(tmp_path: Path) -> None:
    async with trainers(tmp_path) as fleet:
        spec: dict[str, Any] = {"rounds": 8, "settings": {"norm": True, "steps": 5, "lr": 0.3}}
        run = await finished(fleet, strategy="fedbn", **spec)
        assert set(fleet.version(run.head)) == {"w", "b"}
        own = kept(fleet)
        assert all(set(layers) == {"norm.scale", "norm.shift"} for layers in own)
        assert len({weights.digest(layers) for layers in own}) == 3
        # Each peer is better off with its own; a newcomer has the first ones.
        last = run.history[-1]
        assert last.metrics["personal_loss"] < last.metrics["loss"]
        told = [u.update.metrics for u in fleet.facts(run.id) if hasattr(u, "update")]
        assert any("personal_loss" in metrics for metrics in told)


async def test_the_last_layers_stay_at_home_with_any_strategy(tmp_path: Path) -> None:
    async with trainers(tmp_path) as fleet:
        spec: dict[str, Any] = {"rounds": 4, "settings": {"steps": 3, "lr": 0.3}}
        run = await finished(fleet, strategy="fedavgm", personal="fedper:b", **spec)
        assert set(fleet.version(run.head)) == {"w"}
        own = kept(fleet)
        assert all(set(layers) == {"b"} for layers in own)
        assert len({weights.digest(layers) for layers in own}) == 3
        assert run.history[-1].metrics["personal_loss"] < run.history[-1].metrics["loss"]


#: By what is wrong, a run.
_NOT_PERSONAL: dict[str, dict[str, Any]] = {
    "must be finetune, ditto": {"personal": "apfl"},
    "fedbn, which keeps layers": {"personal": "finetune", "strategy": "fedbn"},
    "must name the last layers of softmax": {"personal": "fedper"},
    "a linear model has one": {"personal": "fedper", "task": "tabular"},
    "--personal ditto cannot be used with trees": {
        "personal": "ditto",
        "task": "tabular",
        "settings": {"model": "trees"},
        "strategy": "trees",
        "codec": "sums",
    },
    "above 0 and at most 1000": {"personal": "ditto:-1"},
    "--secure cannot be used with --personal fedper": {
        "personal": "fedper:b",
        "secure": True,
        "quorum": 3,
    },
}


@pytest.mark.parametrize("words", _NOT_PERSONAL)
def test_what_cannot_be_personal_is_refused_in_words(words: str) -> None:
    spec = RunSpec(**{"task": "softmax", "rounds": 1, **_NOT_PERSONAL[words]})
    with pytest.raises(UsageError, match=words):
        spec_rules.check(spec)


async def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    async with trainers(tmp_path) as fleet:
        for spec, words in (
            ({"strategy": "scaffold", "strategy_args": {"option": 4}}, "1, 2 or 3"),
            ({"settings": {"scaffold": 1}}, "the strategy sets it"),
            ({"settings": {"at_home": "*"}}, "the strategy sets it"),
        ):
            with pytest.raises(UsageError) as caught:
                fleet.start(rounds=1, **spec)
            assert words in caught.value.message + caught.value.hint
        run = await fleet.finished(
            fleet.start(rounds=1, quorum=1, strategy="fedbn", strategy_args={"layers": "*"})
        )
        assert run.state is RunState.FAILED


async def test_a_task_that_cannot_be_steered_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "softmax", NAME.replace("Softmax", "Unsteerable"))
    trainer = InProcessTrainer(DataSettings(index=0))
    first, out = tmp_path / "first", tmp_path / "out"
    settings = {"scaffold": 2, "round": 1}
    trainer.run(Init(task="softmax", settings=settings, seed=0, out=str(first)))
    assert set(weights.load(first)) == {"w", "b", "control:w", "control:b"}
    with pytest.raises(CommonweightError, match="has no steer"):
        trainer.run(Train(task="softmax", settings=settings, base=str(first), out=str(out)))
