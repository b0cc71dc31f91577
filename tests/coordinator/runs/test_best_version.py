"""Which version is best, when a run has learnt enough, and whom it serves worst."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks import Task
from agent.tasks.demo.mnist import Mnist
from agent.tasks.language.gpt import TextLM
from coordinator.remote import run_options
from coordinator.runs import best_version, decisions, steps, transitions
from coordinator.runs.decisions import Observation
from coordinator.runs.state import Round, Run, Standing
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec, Update
from protocols.errors import UnknownName, UsageError
from protocols.messages.envelope import Metrics
from protocols.messages.states import RunState
from protocols.tables import evaluation_counts


def spec(**changed: Any) -> RunSpec:
    return RunSpec(task="ping", rounds=50, **changed)


def test_a_run_with_noise_has_no_metrics_and_its_newest_version_counts_as_the_best() -> None:
    rounds = [Round(round=n, digest=f"d{n}") for n in (1, 2)]
    assert best_version.standing(spec(dp_epsilon=3.0), rounds).best is rounds[1]
    assert best_version.standing(spec(), rounds).best is rounds[0]


def test_the_usual_metric_is_accuracy_else_loss() -> None:
    def score(**metrics: float | None) -> float:
        return best_version.score(spec(), dict(metrics))

    assert score(accuracy=0.9, loss=9.0) > score(accuracy=0.8, loss=0.1)
    assert score(loss=0.1) > score(loss=0.2)
    assert score(loss=9e9) > score(loss=None) == score() == -math.inf
    # Where norms stay at home, what a newcomer would have says little.
    assert score(accuracy=0.2, personal_accuracy=0.9) == score(accuracy=0.9)
    assert score(loss=7.0, personal_loss=0.3) == score(loss=0.3)


@pytest.mark.parametrize(
    ("name", "less"),
    [
        ("loss", True),
        ("val_loss", True),
        ("rmse", True),
        ("ece", True),
        ("perplexity", True),
        ("accuracy", False),
        ("macro_f1", False),
        ("r2", False),
        ("lossless", False),
    ],
)
def test_a_metrics_name_says_its_direction(name: str, less: bool) -> None:
    low, high = ({name: value} for value in (0.1, 0.2))
    better = low if less else high
    assert max(low, high, key=lambda m: best_version.score(spec(best_metric=name), m)) == better
    for direction, expected in (("max", high), ("min", low)):
        asked = spec(best_metric=name, best_direction=direction)
        assert max(low, high, key=lambda m: best_version.score(asked, m)) == expected


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        (
            RunSpec(task="mnist", rounds=1, best_metric="f1score"),
            "accuracy, balanced_accuracy, ece, loss",
        ),
        (RunSpec(task="text-lm", rounds=1, best_metric="macro_f1"), "accuracy, loss"),
        (
            RunSpec(
                task="tabular", rounds=1, best_metric="r2", settings={"kind": "classification"}
            ),
            "ece",
        ),
        (
            RunSpec(task="tabular", rounds=1, best_metric="ece", settings={"kind": "regression"}),
            "rmse",
        ),
        (RunSpec(task="mnist", rounds=1, best_metric="personal_"), "accuracy"),
        (RunSpec(task="ping", rounds=1, target=0.9), "it has none"),
        (RunSpec(task="ping", rounds=1, best_metric="accuracy"), "it has none"),
    ],
)
def test_a_metric_that_no_task_tells_is_refused_with_the_known_ones(
    asked: RunSpec, known: str
) -> None:
    with pytest.raises(UnknownName) as refused:
        best_version.check(asked)
    assert known in str(refused.value.hint)


@pytest.mark.parametrize(
    "asked",
    [
        RunSpec(task="mnist", rounds=1, best_metric="macro_f1", target=0.9),
        RunSpec(task="mnist", rounds=1, target=0.9, patience=2),
        RunSpec(task="mnist", rounds=1, best_metric="personal_accuracy"),
        RunSpec(task="tabular", rounds=1, best_metric="r2"),
        RunSpec(task="mine.py:Mine", rounds=1, best_metric="f1score"),  # its peers alone know
        RunSpec(task="ping", rounds=1),
    ],
)
def test_metrics_that_are_told_or_may_be_pass(asked: RunSpec) -> None:
    best_version.check(asked)


def test_until_is_the_goal_and_target_the_column() -> None:
    def typed_as(**typed: Any) -> RunSpec:
        return run_options.build_order({"task": "tabular", **typed}).spec

    found = typed_as(target="price", until="rmse=2.5")
    assert (found.settings["target"], found.best_metric, found.target) == ("price", "rmse", 2.5)
    found = typed_as(until="0.9", **{"best-metric": "macro_f1"})
    assert (found.best_metric, found.target) == ("macro_f1", 0.9)
    assert "target" not in found.settings
    for wrong in ("accuracy", "accuracy=", "accuracy=high"):
        with pytest.raises(UsageError, match="--until takes METRIC=NUMBER"):
            typed_as(until=wrong)
    with pytest.raises(UsageError, match="leave one out"):
        typed_as(target="0.8", until="0.9")
    with pytest.raises(UsageError, match="two metrics"):
        typed_as(until="rmse=2.5", **{"best-metric": "mae"})


def test_a_target_of_an_older_version_may_be_a_goal() -> None:
    def typed_as(*target: str, **more: Any) -> RunSpec:
        return run_options.build_order({"task": "tabular", "target": target, **more}).spec

    found = typed_as("price", "rmse=2.5")
    assert (found.best_metric, found.target) == ("rmse", 2.5)
    assert found.settings["target"] == "price"
    found = typed_as("0.9", **{"best-metric": "macro_f1"})
    assert (found.best_metric, found.target) == ("macro_f1", 0.9)
    assert typed_as("a=b").settings["target"] == "a=b"
    with pytest.raises(UsageError, match="two metrics"):
        typed_as("rmse=2.5", **{"best-metric": "mae"})


@pytest.mark.parametrize(("name", "made"), [("mnist", Mnist), ("text-lm", TextLM)])
def test_the_known_metrics_are_those_that_tasks_tell(
    name: str, made: type[Task], tmp_path: Path
) -> None:
    (tmp_path / "some.txt").write_text("all that is gold does not glitter " * 99)
    task = made()
    task.load(DataSettings(index=0, parts=20, path=str(tmp_path), device="cpu"))
    _, metrics, *counted = task.evaluate(task.init(1, {}), {}, lambda *_: None)
    assert {*metrics, *evaluation_counts.compute_metrics(counted[0])} == best_version.TASK_METRICS[
        name
    ]


def after(told: list[Metrics], **changed: Any) -> Run:
    """A run whose rounds were evaluated so."""
    run = transitions.replay(
        "r", [run_events.RunStarted(spec(**changed)), run_events.WeightsInitialised("0", "A")]
    )
    for number, metrics in enumerate(told, 1):
        for fact in (
            run_events.RoundOpened(number, run.head, ("A",)),
            run_events.UpdateAccepted(number, "A", Update(num_examples=1)),
            run_events.TrainingClosed(number, ("A",)),
            run_events.VersionCommitted(number, str(number), run.head, ("A",), {}),
            run_events.RoundClosed(number, metrics, 1.0, 0, 0),
        ):
            run = transitions.apply(run, fact)
    assert run.round == len(told)
    return run


def step(run: Run) -> steps.Step:
    return decisions.decide(run, Observation(frozenset({"A"})))


def accuracies(*values: float | None) -> list[Metrics]:
    return [{"accuracy": value, "loss": 1.0} for value in values]


def test_patience_ends_a_run_that_gets_no_better() -> None:
    told = accuracies(0.5, 0.7, 0.7, 0.6)
    assert isinstance(step(after(told, patience=3)), steps.OpenRound)
    end = step(after(told, patience=2))
    assert isinstance(end, steps.EndRun)
    assert end.state is RunState.FINISHED
    assert end.because == "no better accuracy or loss in 2 rounds; best is round 2"


def test_a_model_that_still_learns_is_not_ended_by_an_accuracy_over_few_rows() -> None:
    told: list[Metrics] = [{"accuracy": 0.9, "loss": loss} for loss in (0.5, 0.4, 0.3, 0.3, 0.4)]
    run = after(told, patience=2)
    assert run.best is not None
    assert run.best.round == 3, "of the same accuracy, the lowest loss"
    assert isinstance(step(after(told[:4], patience=2)), steps.OpenRound)
    assert isinstance(step(run), steps.EndRun)
    # A run that names its metric goes by that alone.
    named = after(told, patience=2, best_metric="accuracy")
    assert named.best is not None
    assert named.best.round == 1
    assert isinstance(step(after(told[:3], patience=2, best_metric="accuracy")), steps.EndRun)


def test_a_target_ends_a_run_that_has_reached_it() -> None:
    assert isinstance(step(after(accuracies(0.5, 0.89), target=0.9)), steps.OpenRound)
    end = step(after(accuracies(0.5, 0.9), target=0.9))
    assert isinstance(end, steps.EndRun)
    assert end.because == "accuracy is 0.9 in round 2"
    losses: list[Metrics] = [{"loss": 2.0}, {"loss": 0.4}]
    assert isinstance(step(after(losses, target=0.5)), steps.EndRun)
    assert isinstance(step(after(losses, target=0.3)), steps.OpenRound)


def test_a_metric_that_nobody_tells_ends_the_run_with_those_that_are_told() -> None:
    end = step(after(accuracies(0.5), best_metric="f1"))
    assert isinstance(end, steps.EndRun)
    assert end.state is RunState.FAILED
    assert end.because == "no peer reports the metric f1; they report: accuracy, loss"
    # Nobody was there to evaluate: that says nothing.
    assert isinstance(step(after([{}], best_metric="f1")), steps.OpenRound)
    assert isinstance(step(after([{"x": 1.0}], target=1.0)), steps.EndRun)
    assert isinstance(step(after([{"x": 1.0}])), steps.OpenRound)


def test_a_round_that_diverged_is_never_best() -> None:
    run = after(accuracies(None, 0.1, None))
    assert run.best is not None
    assert run.best.round == 2


metrics = st.dictionaries(
    st.sampled_from(["accuracy", "loss"]), st.none() | st.floats(), max_size=2
)


@given(st.dictionaries(st.sampled_from("ABCD"), metrics))
def test_the_worst_peer_is_one_than_which_none_is_worse(told: dict[str, Metrics]) -> None:
    found = best_version.worst_peers(
        {p: Update(num_examples=1, metrics=m) for p, m in told.items()}
    )
    for name in ("accuracy", "loss"):
        finite = {
            p: value
            for p, m in told.items()
            if (value := m.get(name)) is not None and math.isfinite(value)
        }
        assert (name in found) == bool(finite)
        if finite:
            extreme = max(finite.values()) if name == "loss" else min(finite.values())
            assert finite[found[name]] == extreme


def test_of_accuracies_that_few_rows_cannot_tell_apart_the_lowest_loss_is_best() -> None:
    """Trees that answer the frequent class alone have the highest accuracy, and tell nothing."""
    told = [(0.94, 0.23), (0.935, 0.22), (0.93, 0.21), (0.90, 0.20), (0.935, 0.25)]
    rounds = [
        Round(round=n, digest="", metrics={"accuracy": a, "loss": b}, num_evaluated=500)
        for n, (a, b) in enumerate(told, 1)
    ]
    near = spec(ties="standard error")
    assert best_version.standing(near, rounds).best is rounds[2], "0.90 is below a standard error"
    assert best_version.standing(spec(), rounds).best is rounds[0]
    assert {best_version.standing(one, rounds).gained for one in (near, spec())} == {4}
    many = [replace(one, num_evaluated=10**7) for one in rounds]
    assert best_version.standing(near, many).best is many[0]
    found = Standing()
    for closed in rounds:
        before, found = found.best, best_version.after(near, found, closed)
        assert found.best in (closed, before), "its file may be gone"


def test_between_models_the_best_version_of_each_counts_by_the_mean_of_all_peers() -> None:
    def model(number: int, *told: tuple[float, float, float]) -> Standing:
        """Versions with an accuracy, a loss, and the loss of the peers in the middle."""
        rounds = [
            Round(
                round=number + n,
                digest="",
                num_evaluated=150,
                metrics={"accuracy": accuracy, "loss": loss},
                decisive={"loss": middle, "accuracy": 1 - middle / 2 if accuracy < 0.9 else 0.98},
            )
            for n, (accuracy, loss, middle) in enumerate(told)
        ]
        return best_version.standing(spec(ties="standard error", outlier_limit=3.0), rounds)

    order = spec(ties="standard error", outlier_limit=3.0)
    mlp = model(1, (0.76, 0.520, 0.53))
    trees = model(9, (0.79, 0.523, 0.52), (0.82, 0.6, 0.6))
    assert best_version.of_models(order, [mlp, trees]) is mlp.best, "one of many was right by luck"
    right = model(9, (0.99, 0.9, 0.9))  # trees that are right, and not sure of it yet
    assert best_version.of_models(order, [mlp, right]) is right.best
    praised = model(9, (0.79, 0.4, 0.7))
    assert best_version.of_models(order, [mlp, praised]) is mlp.best, "not in the middle"
    assert best_version.of_models(order, [mlp, model(9, (0.79, 0.4, 0.6))]) is not mlp.best
    assert best_version.of_models(order, [mlp]) is mlp.best
    assert best_version.of_models(order, [Standing()]) is None


def test_runs_of_tables_take_the_lowest_loss_unless_they_are_given_a_goal() -> None:
    def ties(**typed: Any) -> str:
        return run_options.build_order({"task": "tabular", "target": "y", **typed}).spec.ties

    assert (ties(), ties(until="0.9")) == ("standard error", "exact")
    assert run_options.build_order({"task": "mnist"}).spec.ties == "exact"
