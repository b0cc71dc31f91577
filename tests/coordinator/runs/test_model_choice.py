"""Runs of `model=auto` choose their model by the scores that their peers tell."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.policy.consent import Consent
from coordinator.remote.run_options import build_order
from coordinator.runs import decisions, model_choice, spec_rules, steps, transitions
from coordinator.runs.decisions import Observation
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import ModelsCompared, RunEvent, RunSpec, ScoresMissing
from protocols.errors import TrainerFailed, UsageError
from protocols.messages.states import RunState
from protocols.model import schema_card
from protocols.tables import preprocessing
from protocols.tables.model_scores import ModelScores
from protocols.tables.preprocessing import Feature, Preprocessing, Target
from tests.coordinator.runs.test_loop import THREE
from tests.support.in_process_fleet import Agent, Fleet, fleet_of
from tests.support.waiting import until

RULES = preprocessing.encode(
    Preprocessing(
        features=(Feature(name="a", kind="number"),),
        target=Target(name="y", kind="text", classes=("n", "y")),
    )
)


def spec_of(**typed: Any) -> RunSpec:
    """The settings of `run start tabular --target y` with more options."""
    return build_order({"task": "tabular", "target": "y", **typed}).spec


def one_of(**typed: Any) -> RunSpec:
    """Those of a run that trains one model, as it has a number of rounds."""
    return spec_of(**{"rounds": 2_000, **typed})


def scores(rows: int, name: str = "accuracy", **by_model: float) -> ModelScores:
    return ModelScores(rows=rows, metrics={m: {name: v} for m, v in by_model.items()})  # type: ignore[misc]


def compared(spec: RunSpec, *told: ModelScores, rows: int = 0, missing: str = "") -> Run:
    """A run whose peers have told these scores and have `rows` rows."""
    log: list[RunEvent] = [run_events.RunStarted(spec), run_events.PreprocessingFixed(RULES, ())]
    log += [ModelsCompared(f"p{number}", one) for number, one in enumerate(told)]
    log += [ScoresMissing("p9", missing, "")] if missing else []
    return replace(transitions.replay("r", log), declared={"p0": (rows, rows)} if rows else {})


def test_the_mean_by_rows_decides_and_the_line_says_so() -> None:
    chosen = model_choice.choose(
        compared(
            one_of(),
            ModelScores(
                rows=900,
                metrics={
                    "linear": {"loss": 0.9, "rmse": 106.0},
                    "mlp": {"loss": 0.2, "rmse": 36.0},
                    "trees": {"loss": 0.1, "rmse": 35.0},
                },
            ),
            ModelScores(
                rows=100,
                metrics={
                    "linear": {"loss": 0.9, "rmse": 106.0},
                    "mlp": {"loss": 0.2, "rmse": 36.0},
                    "trees": {"loss": 0.5, "rmse": 36.5},
                },
            ),
            ModelScores(),
        )
    )
    assert (chosen.model, chosen.metric, chosen.rows) == ("trees", "rmse", 1000)
    assert chosen.peers == ("p0", "p1"), "one without scores does not count"
    assert model_choice.line(chosen) == (
        "model: trees (RMSE 35.15; mlp 36, linear 106; 2 peers, 1,000 rows); without --secure, "
        "no hessians leave the peers, which costs trees some accuracy"
    )
    spec_rules.check(chosen.spec)
    assert (chosen.spec.strategy, chosen.spec.codec, chosen.spec.rounds) == ("trees", "sums", 1801)
    assert (chosen.spec.patience, chosen.then) == (0, ())


def test_the_errors_that_most_peers_have_decide_and_not_the_largest_ones() -> None:
    """As on a table of colleges, where the MLP's RMSE is 858 and that of the linear model 1187."""

    def told(rows: int, **rmse: float) -> ModelScores:
        by_model = {model: {"loss": v * v, "rmse": v} for model, v in rmse.items()}
        return ModelScores(rows=rows, metrics=by_model)  # type: ignore[arg-type]

    found = [(279, 1126.0, 965.7), (140, 1591.0, 1969.0), (48, 1793.0, 1391.0)]
    assert sum(rows * a * a for rows, a, _ in found) < sum(rows * b * b for rows, _, b in found)
    each = [told(rows, linear=a, mlp=b) for rows, a, b in found]
    assert model_choice.choose(compared(one_of(), *each)).model == "mlp"
    exact = told(90, linear=0.0, mlp=1e-3), told(10, linear=1.0, mlp=1e-3)
    assert model_choice.choose(compared(one_of(), *exact)).model == "linear"


def test_of_equal_scores_the_simplest_model_is_chosen_and_a_run_goes_on_with_it() -> None:
    run = compared(one_of(), scores(50, linear=0.8, mlp=0.8, trees=0.8))
    assert run.comparing
    chosen = model_choice.choose(run)
    assert chosen.spec.settings["model"] == chosen.model == "linear"
    after = transitions.apply(run, run_events.decode(run_events.encode(chosen)))
    assert (after.comparing, after.describing, after.spec) == (False, True, chosen.spec)
    assert (after.peers, after.scores, after.choice) == ({}, {}, chosen)


def test_the_loss_decides_between_accuracies_that_few_rows_cannot_tell_apart() -> None:
    told = {"linear": (0.965, 0.1), "mlp": (0.97, 0.3), "trees": (0.8, 0.05)}
    for rows, model in ((300, "linear"), (9_000, "mlp")):
        metrics = {name: {"accuracy": a, "loss": b} for name, (a, b) in told.items()}
        some = ModelScores(rows=rows, metrics=metrics)  # type: ignore[arg-type]
        assert model_choice.choose(compared(one_of(), some)).model == model


def test_the_metric_of_the_run_decides() -> None:
    told = ModelScores(
        rows=90,
        metrics={
            "linear": {"accuracy": 0.9, "macro_f1": 0.5},
            "mlp": {"accuracy": 0.8, "macro_f1": 0.7},
        },
    )
    assert model_choice.choose(compared(one_of(), told)).model == "linear"
    chosen = model_choice.choose(compared(one_of(**{"best-metric": "macro_f1"}), told))
    assert (chosen.model, chosen.metric) == ("mlp", "macro_f1")
    assert chosen.left_out == {"trees": "1 peer cannot train it"}


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ({"codec": "int8"}, "--codec"),
        ({"strategy": "fedprox"}, "--strategy"),
        ({"select": "1.2x"}, "--select"),
        ({"weighting": "equal"}, "--weighting"),
        ({"late": "fold"}, "--late fold"),
        ({"outlier-limit": 2.0}, "--outlier-limit"),
        ({"mode": "buffered", "buffer": 2}, "--mode buffered"),
        ({"clip-norm": 1.0}, "--clip-norm"),
        ({"rounds": 20}, "1801 rounds"),
        ({"set": ("trees=x",)}, "whole numbers"),
    ],
)
def test_trees_are_named_where_the_options_do_not_fit_them(
    typed: dict[str, Any], word: str
) -> None:
    chosen = model_choice.choose(
        compared(one_of(**typed), scores(50, linear=0.7, mlp=0.8, trees=0.9))
    )
    assert chosen.model == "mlp"
    assert word in chosen.left_out["trees"]
    assert "trees left out: " in model_choice.line(chosen)


def test_an_older_agent_takes_part_in_what_it_can_train() -> None:
    run = compared(one_of(), scores(50, linear=0.7, mlp=0.8, trees=0.9), missing=UsageError.code)
    chosen = model_choice.choose(run)
    assert (chosen.model, chosen.left_out["trees"]) == ("mlp", "an agent is too old for them")
    silent = compared(one_of(), scores(50, linear=0.7, mlp=0.8, trees=0.9), missing="died")
    assert model_choice.choose(silent).model == "trees"


@pytest.mark.parametrize(
    ("typed", "rows", "model"),
    [
        ({"secure": True, "quorum": 3}, 5_000, "trees"),
        ({"secure": True, "quorum": 3}, 500, "linear"),
        ({"secure": True, "quorum": 3}, 0, "linear"),
        ({"dp": 3.0}, 5_000, "linear"),
    ],
)
def test_secure_runs_and_runs_with_noise_ask_for_no_score(
    typed: dict[str, Any], rows: int, model: str
) -> None:
    run = compared(one_of(**typed), rows=rows)
    step = model_choice.decide(run, {"p0", "p1", "p2"}, frozenset(), False)
    assert isinstance(step, steps.ChooseModel)
    chosen = model_choice.choose(run)
    assert (chosen.model, chosen.scores) == (model, {})
    assert "no score" in model_choice.line(chosen)
    spec_rules.check(chosen.spec)


def test_a_secure_run_trains_a_perceptron_on_few_rows_with_numbers_to_predict() -> None:
    numbers = preprocessing.encode(
        Preprocessing(
            features=(Feature(name="a", kind="number"),), target=Target(name="y", kind="number")
        )
    )
    run = replace(compared(one_of(secure=True, quorum=3), rows=500), preprocessing=numbers)
    chosen = model_choice.choose(run)
    assert chosen.model == "mlp"
    assert "500 rows, trees from 2,000; mlp for numbers" in model_choice.line(chosen)
    spec_rules.check(chosen.spec)
    plain = model_choice.choose(replace(run, spec=one_of()))
    assert plain.model == "linear", "no peer had enough rows to compare models"


def test_the_peers_with_the_most_rows_are_asked() -> None:
    run = replace(compared(one_of()), declared={f"p{n:03}": (n, n) for n in range(100)})
    step = model_choice.decide(run, set(run.declared), frozenset(), False)
    assert isinstance(step, steps.AskPeers)
    assert step.peers == tuple(f"p{n:03}" for n in range(84, 100))


def test_a_slow_peer_is_left_out_of_the_choice() -> None:
    run = compared(one_of(), scores(50, linear=0.7, mlp=0.8, trees=0.9))
    run = transitions.apply(run, run_events.PeersAsked(("p0", "p1")))
    run = transitions.apply(run, ModelsCompared("p0", scores(50, linear=0.7, mlp=0.8)))
    waiting = decisions.decide(run, Observation(frozenset({"p0", "p1"})))
    assert isinstance(waiting, steps.Wait)
    assert waiting.peers == ("p1",)
    step = decisions.decide(run, Observation(frozenset({"p0", "p1"}), deadline_passed=True))
    assert step == steps.ChooseModel()
    assert decisions.phase_deadline_s(run) == model_choice.DEADLINE_S


def test_a_run_without_a_model_compares_them_and_ends_by_itself() -> None:
    spec = spec_of()
    assert (spec.settings["model"], spec.rounds, spec.patience) == ("auto", 100, 10)
    assert spec_of(set=("model=linear",)).settings["model"] == "linear"
    assert (spec_of(rounds=30).rounds, spec_of(rounds=30).patience) == (30, 0)
    assert (spec_of(patience=3).rounds, spec_of(patience=3).patience) == (100, 3)
    noisy = spec_of(dp=3.0)
    assert (noisy.rounds, noisy.patience) == (10, 0), "no metric says when a version is better"
    own = build_order({"task": "mine.py:Mine"}).spec
    assert (own.rounds, own.patience) == (10, 0)
    trees = spec_of(set=("model=trees",))
    assert (trees.rounds, trees.patience, trees.evaluate_every) == (1801, 240, 60)


# --- in a fleet ----------------------------------------------------------------------------------


def telling(agent: Agent, told: Callable[[], ModelScores]) -> list[str]:
    """Make an agent tell scores if it is asked, else its card; the models that it was asked for."""
    card, asked = agent.trainer.describe, list[str]()

    def describe(task: str, settings: Any) -> bytes:
        asked.append(settings["model"])
        if settings["model"] == "auto":
            return schema_card.encode(told())
        return card(task, settings)

    agent.trainer.describe = describe  # type: ignore[method-assign]
    agent.owner = replace(agent.owner, tasks=("*",), consents={"*": Consent(columns=("*",))})
    return asked


def start(fleet: Fleet, **more: Any) -> str:
    settings = {"target": "y", "model": "auto", "preprocessing": RULES}
    given = {"rounds": 2, "quorum": 3, "handshake": True, "settings": settings}
    return fleet.hub.runs.start(RunSpec(task="tabular", **given | more), "")


def refuse() -> ModelScores:
    raise TrainerFailed(UsageError.code, "the setting model cannot be 'auto'")


async def test_a_peer_without_scores_takes_part_in_the_run(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        old, *others = fleet.agents
        asked = [telling(old, refuse)]
        asked += [telling(one, lambda: scores(80, linear=0.7, mlp=0.9)) for one in others]
        run = await fleet.finished(run_id := start(fleet))
        assert run.state is RunState.FINISHED, run.ended_because
        assert {len(closed.contributors) for closed in run.history} == {3}
        assert fleet.refusals(run_id) == []
        assert run.choice is not None
        assert (run.spec.settings["model"], run.choice.rows) == ("mlp", 160)
        assert all(models[0] == "auto" and set(models[1:]) == {"mlp"} for models in asked)
        said = [event.text for event in fleet.hub.fleet.events]
        assert f"run {run_id}: {model_choice.line(run.choice)}" in said
        # The monitor shows it, and each owner hears it with the work.
        assert fleet.hub.fleet.runs[run_id].changed.choice == model_choice.text(run.choice)
        assert old.seen.works[-1].choice == model_choice.text(run.choice)
        (line,) = [text for text in said if "compares no models" in text]
        assert "cannot be 'auto'" in line


@pytest.mark.parametrize(
    "lie",
    [scores(10_000, linear=7.0), scores(50, "rmse", linear=-1.0)],
    ids=["an accuracy of 7", "an error below 0"],
)
async def test_scores_that_no_model_can_have_do_not_count(tmp_path: Path, lie: ModelScores) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        liar, *others = fleet.agents
        telling(liar, lambda: lie)
        for one in others:
            telling(one, lambda: scores(80, linear=0.7, mlp=0.9))
        run = await fleet.finished(start(fleet))
        assert run.choice is not None
        assert run.choice.peers == tuple(sorted(one.peer for one in others))


async def test_a_restart_while_peers_compare_loses_no_score(tmp_path: Path) -> None:
    fleet, door = Fleet(tmp_path), threading.Event()

    def told() -> ModelScores:
        return scores(80, linear=0.7, mlp=0.9)

    def late() -> ModelScores:
        assert door.wait(60)
        return told()

    try:
        async with fleet.up():
            for number, part in enumerate(THREE):
                telling(fleet.join(f"agent{number}", part), told if number else late)
            await fleet.online(3)
            run_id = start(fleet)
            await until(lambda: len(fleet.facts(run_id, ModelsCompared)) == 2)
        async with fleet.up():
            door.set()
            run = await fleet.finished(run_id)
            assert run.choice is not None
            assert (run.choice.model, run.choice.rows) == ("mlp", 240)
            assert len(fleet.facts(run_id, ModelsCompared)) == 3
            assert run.state is RunState.FINISHED
            await fleet.close()
    finally:
        await fleet.close()
