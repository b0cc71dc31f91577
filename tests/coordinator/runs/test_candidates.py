"""Runs of `model=auto` that end by themselves train several models and keep the best version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.policy.consent import Consent
from agent.tasks.work import Done
from coordinator.api import named_models
from coordinator.cli import run_text
from coordinator.runs import (
    candidates,
    export,
    model_choice,
    recovery,
    retention,
    steps,
    transitions,
)
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import ModelBegun, ModelChosen, RunSpec, VersionCommitted
from protocols.errors import TrainerFailed, UsageError
from protocols.messages.states import RunState
from protocols.model import schema_card
from protocols.model.weights import Weights
from protocols.tables.model_scores import ModelScores
from protocols.tables.trees import layout
from tests.coordinator.runs.test_model_choice import RULES, compared, scores, spec_of
from tests.coordinator.runs.test_strategy_runs import Axe, Killed
from tests.support.in_process_fleet import (
    Agent,
    Data,
    Fleet,
    first_weights,
    fleet_of,
    gradient_step,
    some_data,
)
from tests.support.secure_fleet import trust_each_other
from tests.support.tree_peers import Forest
from tests.support.waiting import until

PARTS = [some_data(50, 1), some_data(70, 2), some_data(40, 3)]
FOREST = Forest.of(5, trees=2, depth=3, bins=8, min_weight=0.5)
SETTINGS = {
    "target": "y",
    "model": "auto",
    "preprocessing": RULES,
    "trees": 2,
    "depth": 3,
    "bins": 8,
}
#: By model and by round, from the first: the losses that all peers evaluate. A run has patience 2.
LOSSES: dict[str, tuple[float, ...]] = {
    "linear": (0.9, 0.8, 0.8, 0.8),
    "mlp": (0.9, 0.5, 0.6, 0.7),
    "trees": (0.95, 0.7, 0.65),
}


def teach(agent: Agent, losses: dict[str, tuple[float, ...]] = LOSSES) -> list[str]:
    """Make an agent train all models; what it was asked for: a kind and a model each."""
    trainer, data = agent.trainer, agent.trainer.data
    rows = FOREST.rows(data.x, (data.y > 0).astype(np.int64))
    asked: list[str] = []

    def grow(version: Weights, _: Data) -> Weights:
        at, numbers = layout.read(version, FOREST.shape)
        masked = bool(agent.client and agent.seen.works[-1].codec.endswith("masked"))
        return Weights({"sums": rows.sums(version, at, numbers, masked=masked)})

    def step(version: Weights, _: Data) -> Weights:
        found = {name: version[name] for name in version.schema if name == "deep"}
        return Weights({**found, **gradient_step(version, data)})

    def first(model: str, seed: int) -> Weights:
        if model == "trees":
            return Weights(FOREST.first())
        more = {"deep": np.zeros(3, np.float32)} if model == "mlp" else {}
        return Weights({**more, **first_weights(5, seed)})

    def with_model(kind: str, settings: Any) -> None:
        model = settings["model"]
        asked.append(f"{kind} {model}")
        trainer.first = lambda seed: first(model, seed)
        trainer.step = grow if model == "trees" else step
        told = losses.get(model, (0.0,))
        at = (
            (int(settings["round"]) - 1) // (3 if model == "trees" else 1)
            if kind == "evaluate"
            else 0
        )
        trainer.loss = lambda *_: told[min(at, len(told) - 1)]

    describe, init, train, evaluate = (
        *(trainer.describe, trainer.init),
        *(trainer.train, trainer.evaluate),
    )

    def describing(task: str, settings: Any) -> bytes:
        if settings["model"] == "auto":
            asked.append("describe auto")
            return schema_card.encode(scores(50, "loss", linear=0.9, mlp=0.8, trees=0.85))
        with_model("describe", settings)
        return describe(task, settings)

    def initialising(task: str, settings: Any, seed: int, out: Path) -> Done:
        with_model("init", settings)
        return init(task, settings, seed, out)

    def training(task: str, settings: Any, base: Path, out: Path) -> Done:
        with_model("train", settings)
        return train(task, settings, base, out)

    def evaluating(task: str, settings: Any, base: Path) -> Done:
        with_model("evaluate", settings)
        return evaluate(task, settings, base)

    trainer.describe, trainer.init = describing, initialising  # type: ignore[method-assign]
    trainer.train, trainer.evaluate = training, evaluating  # type: ignore[method-assign]
    agent.owner = replace(agent.owner, tasks=("*",), consents={"*": Consent(columns=("*",))})
    return asked


def order(**more: Any) -> RunSpec:
    given = {"rounds": 100, "patience": 2, "quorum": 3, "handshake": True, "settings": SETTINGS}
    return RunSpec(task="tabular", **given | more)


def start(fleet: Fleet, **more: Any) -> str:
    return fleet.hub.runs.start(order(**more), "")


def taught(fleet: Fleet) -> None:
    for agent in fleet.agents:
        teach(agent)
    trust_each_other(fleet)


def versions(fleet: Fleet, run_id: str) -> list[tuple[int, str]]:
    return [(one.round, one.digest) for one in fleet.facts(run_id, VersionCommitted)]


async def test_each_model_is_trained_as_alone_and_the_best_version_is_kept(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *PARTS) as fleet:
        taught(fleet)
        run = await fleet.finished(run_id := start(fleet))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, []), run.ended_because
        _check_course(run)

        # What others get of the run is the model that is kept.
        assert run.best is not None
        named = named_models.find(fleet.hub, run_id, "best")
        assert (named.round, named.settings["model"], named.ended_rounds) == (7, "mlp", 4)
        assert named.choice == candidates.text(run)
        whole = fleet.hub.runs.find(run_id)
        card = export.build_card(whole, run.best.digest, "", {}, {})
        assert (card.settings["model"], card.round, len(card.parents)) == ("mlp", 7, 2)
        kept = {path.stem for path in (fleet.home / "versions").iterdir()}
        assert run.best.digest in kept
        assert not kept & {one.first for one in run.trained}

        # Owners and operators read which model is trained, and which is kept.
        told = list(dict.fromkeys(work.choice for work in fleet.agents[0].seen.works))
        assert told == [
            "",
            "linear now, 1 of 3",
            "mlp now, 2 of 3 (linear: loss 0.8 in round 2)",
            "trees now, 3 of 3 (linear: loss 0.8 in round 2; mlp: loss 0.5 in round 7)",
        ]
        said = [event.text for event in fleet.hub.fleet.events]
        assert f"run {run_id}: {told[2]}" in said
        assert fleet.hub.fleet.runs[run_id].changed.choice == candidates.text(run)

        # The MLP has the versions of a run that trains it alone.
        alone = await fleet.finished(start(fleet, settings={**SETTINGS, "model": "mlp"}))
        of_mlp = [digest for number, digest in versions(fleet, run_id) if 6 <= number <= 9]
        assert [closed.digest for closed in alone.history] == of_mlp


def _check_course(run: Run) -> None:
    """Linear in 1 to 4, the MLP in 6 to 9, trees from 11 on: 1 round for cuts, 2 trees of 3
    levels."""
    numbers = [*range(1, 5), *range(6, 10), *range(11, 18)]
    assert [closed.round for closed in run.history] == numbers
    assert [one.model for one in run.trained] == ["linear", "mlp"]
    assert run.trained[0].because == "no better loss in 2 rounds; best is round 2"
    assert run.best is not None
    assert (run.best.round, run.best.metrics["loss"]) == (7, pytest.approx(0.5))
    assert run.ended_because.startswith(
        "mlp is kept (linear: loss 0.8 in round 2; mlp: loss 0.5 in round 7; trees: loss 0.65 in"
    )


@pytest.mark.long
async def test_a_secure_run_trains_all_models_and_hears_sums_alone(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *PARTS) as fleet:
        taught(fleet)
        run = await fleet.finished(run_id := start(fleet, secure=True, clip_norm=10.0))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, []), run.ended_because
        _check_course(run)
        assert run.evaluations == {}
        assert not fleet.facts(run_id, run_events.ModelsCompared)
        told = {work.choice for work in fleet.agents[0].seen.works}
        assert "mlp now, 2 of 3 (after linear)" in told, "no owner hears the metrics of the others"
        named = named_models.find(fleet.hub, run_id, "best")
        assert named.choice == "mlp is kept (of linear, mlp, trees)"


#: Where the coordinator is killed, and for the how manieth time. An evaluation that is interrupted
#: closes its round without metrics, as in every run, so that the course may be another one.
_POINTS = (
    ("run.recorded.ModelChosen", 1),
    ("run.recording.ModelBegun", 1),
    ("run.recorded.ModelBegun", 1),
    ("run.recorded.SchemaAgreed", 2),
    ("run.recorded.WeightsInitialised", 2),
    ("run.recorded.RoundOpened", 5),
    ("run.recording.RoundClosed", 8),
    ("run.recorded.RoundClosed", 8),
    ("run.recorded.ModelBegun", 2),
    ("run.recording.RunEnded", 1),
)


async def _killed(fleet: Fleet, axe: Axe, at: str, nth: int, **more: Any) -> Run:
    """A run whose coordinator is killed there, and started again."""
    axe.aim(at, nth)
    run_id = ""
    try:
        async with fleet.up():
            run_id = start(fleet, **more)
            await until(lambda: axe.left == 0)
        pytest.fail(f"{at} was not reached")
    except Killed:
        pass
    async with fleet.up():
        return await fleet.finished(run_id)


async def _joined(fleet: Fleet) -> None:
    for number, part in enumerate(PARTS):
        fleet.join(f"agent{number}", part)
    await fleet.online(3)
    taught(fleet)


async def _compare_with_undisturbed(
    folder: Path, patch: pytest.MonkeyPatch, points: tuple[tuple[str, int], ...]
) -> None:
    axe, fleet = Axe(patch), Fleet(folder)
    try:
        async with fleet.up():
            await _joined(fleet)
            undisturbed = await fleet.finished(start(fleet))
            expected = [(one.round, one.digest) for one in undisturbed.history]
        for at, nth in points:
            run = await _killed(fleet, axe, at, nth)
            found = [(one.round, one.digest) for one in run.history]
            assert found == expected, f"killed at {at} {nth}"
            _check_course(run)
    finally:
        await fleet.close()


async def test_a_killed_coordinator_goes_on_with_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _compare_with_undisturbed(tmp_path, monkeypatch, _POINTS[2:4])


@pytest.mark.long
async def test_killed_at_any_step_the_versions_are_those_of_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _compare_with_undisturbed(tmp_path, monkeypatch, _POINTS)


@pytest.mark.long
async def test_a_killed_secure_run_goes_on_with_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axe, fleet = Axe(monkeypatch), Fleet(tmp_path)
    try:
        async with fleet.up():
            await _joined(fleet)
        for at, nth in (("run.recorded.ModelBegun", 1), ("run.recorded.SurvivorsFixed", 11)):
            _check_course(await _killed(fleet, axe, at, nth, secure=True, clip_norm=10.0))
    finally:
        await fleet.close()


async def test_a_model_that_peers_refuse_is_passed_over(tmp_path: Path) -> None:
    """Agents that are too old for trees do not end the run, and it keeps the best of the others."""
    async with fleet_of(tmp_path, *PARTS) as fleet:
        taught(fleet)
        old = fleet.agents[0].trainer
        describe = old.describe

        def refusing(task: str, settings: Any) -> bytes:
            if settings["model"] == "trees":
                raise TrainerFailed(UsageError.code, "the setting model cannot be 'trees'")
            return bytes(describe(task, settings))

        old.describe = refusing  # type: ignore[method-assign]
        run = await fleet.finished(start(fleet))
        assert run.state is RunState.FINISHED
        assert run.best is not None
        assert run.best.round == 7
        assert "trees: only 2 peers can take part" in run.ended_because
        assert "cannot be 'trees'" in run.ended_because
        versions_left = fleet.hub.runs.find(run.id)
        assert export.resolve_version(versions_left, "latest") == run.history[-1].digest
        assert named_models.find(fleet.hub, run.id, "best").settings["model"] == "mlp"


async def test_the_target_ends_the_run_whatever_models_are_left(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *PARTS) as fleet:
        taught(fleet)
        run = await fleet.finished(start(fleet, target=0.85, best_metric="loss"))
        assert (run.state, run.ended_because) == (RunState.FINISHED, "loss is 0.8 in round 2")
        assert (run.trained, run.upcoming) == ((), ("mlp", "trees"))
        assert "model: linear is kept (linear: loss 0.8 in round 2)" in run_text.choice_lines(run)


def test_models_that_are_clearly_worse_are_not_trained() -> None:
    chosen = model_choice.choose(
        compared(spec_of(), scores(90, "loss", linear=0.9, mlp=0.5, trees=0.6))
    )
    assert (chosen.model, chosen.then) == ("mlp", ("trees",))
    assert chosen.left_out["linear"] == "its loss in the cross-validation is 1.8 times the least"
    assert model_choice.text(chosen).startswith("mlp, then trees (each peer alone: mlp loss 0.5;")
    told = {"linear": (0.99, 0.1), "mlp": (0.995, 0.01), "trees": (0.96, 0.02)}
    right = ModelScores(
        rows=200,
        metrics={name: {"accuracy": a, "loss": b} for name, (a, b) in told.items()},  # type: ignore[misc]
    )
    almost = model_choice.choose(compared(spec_of(), right))
    assert almost.left_out.keys() == {"trees"}, "the linear model is hardly ever wrong"
    every = model_choice.choose(
        compared(spec_of(), scores(90, "loss", linear=0.7, mlp=0.5, trees=0.6))
    )
    assert (every.model, every.then) == ("linear", ("mlp", "trees"))


@pytest.mark.parametrize(
    ("typed", "models"),
    [
        ({}, ("linear", "mlp", "trees")),
        ({"secure": True, "quorum": 3}, ("linear", "mlp", "trees")),
        ({"patience": 3}, ("linear", "mlp", "trees")),
        ({"until": "0.9"}, ("linear", "mlp", "trees")),
        ({"codec": "int8"}, ("linear", "mlp")),
        ({"personal": "ditto"}, ("linear", "mlp")),
        ({"rounds": 20}, ("linear",)),
        ({"rounds": 20, "patience": 3}, ("linear", "mlp")),
        ({"dp": 3.0}, ("linear",)),
        ({"personal": "fedper"}, ("mlp",)),
        ({"strategy": "scaffold"}, ("linear",)),
    ],
)
def test_which_runs_train_several_models(typed: dict[str, Any], models: tuple[str, ...]) -> None:
    run = compared(spec_of(**typed), scores(90, linear=0.8, mlp=0.8, trees=0.8))
    chosen = model_choice.choose(run)
    assert (chosen.model, *chosen.then) == models


def test_a_backup_from_before_a_model_begins_it_again() -> None:
    """The peers have versions of the next model only, and the ledger knows nothing of it."""
    chosen = model_choice.choose(compared(spec_of(), scores(90, linear=0.8, mlp=0.8)))
    log = [
        *(run_events.RunStarted(spec_of()), chosen, run_events.WeightsInitialised("v0", "A")),
        run_events.RecallBegun(False),
        run_events.PeersAsked(("A",)),
        run_events.HoldingTold("A", None),
    ]
    run = transitions.replay("r", log)
    step = recovery.decide(run, frozenset("A"), True)
    assert isinstance(step, steps.BeginModel)
    assert step.model == "linear"
    again = transitions.apply(run, candidates.event(run, step))
    assert (again.recalling, again.trained, again.upcoming) == (False, (), ("mlp",))
    assert (again.round, again.begun, again.spec.first_round, again.head) == (1, 1, 2, "")


def test_a_damaged_version_returns_to_one_of_the_same_model() -> None:
    run = transitions.replay("r", [run_events.RunStarted(spec_of()), *_two_models()])
    assert (run.round, run.head, run.begun) == (5, "m2", 3)
    assert retention.newest_intact(run, lambda digest: digest in ("l1", "m1")) == "m1"
    assert retention.newest_intact(run, lambda digest: digest == "l1") == ""
    back = transitions.apply(run, run_events.VersionLost("m2", "m0"))
    assert (back.round, back.head) == (3, "m0")
    assert [closed.digest for closed in back.history] == ["l1", "l2"]
    stopped = transitions.apply(run, run_events.RunEnded(RunState.STOPPED, "by the operator"))
    resumed = transitions.apply(stopped, run_events.RunResumed())
    assert (resumed.round, resumed.head, resumed.parent) == (5, "m2", "m1")
    assert resumed.best is not None
    assert resumed.best.digest == "m1"
    assert retention.versions_to_keep(resumed) >= {"l2", "m1", "m2"}, "of each model, the best"


def _two_models() -> list[run_events.RunEvent]:
    """Two rounds of a linear model, then two of an MLP."""
    chosen = model_choice.choose(compared(spec_of(), scores(90, linear=0.8, mlp=0.8)))
    assert isinstance(chosen, ModelChosen)
    log: list[run_events.RunEvent] = [chosen, run_events.WeightsInitialised("l0", "A")]
    log += [*_round(1, "l0", "l1", 0.9), *_round(2, "l1", "l2", 0.8)]
    run = transitions.replay("r", [run_events.RunStarted(spec_of()), *log])
    begun = candidates.event(run, steps.BeginModel("mlp", "x"))
    assert isinstance(begun, ModelBegun)
    log += [begun, run_events.WeightsInitialised("m0", "A")]
    return [*log, *_round(4, "m0", "m1", 0.5), *_round(5, "m1", "m2", 0.6)]


def _round(number: int, base: str, made: str, loss: float) -> list[run_events.RunEvent]:
    return [
        run_events.RoundOpened(number, base, ("A",)),
        run_events.TrainingClosed(number, ("A",)),
        run_events.VersionCommitted(number, made, base, ("A",), {}),
        run_events.RoundClosed(number, {"loss": loss}, 1.0, 0, 0),
    ]
