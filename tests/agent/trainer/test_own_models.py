"""A peer compares models on its own held-out rows: alone, shared, personal, and a blend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings, Floors
from agent.tasks.capabilities import LocalRounds
from agent.tasks.tabular import Tabular
from agent.tasks.work import Measure
from agent.trainer import own_models, row_bootstrap
from agent.trainer.executor import WorkExecutor
from agent.trainer.ipc import Answer, Progress
from agent.trainer.own_models import Fit
from agent.trainer.progress import WorkControl
from protocols.errors import DataError
from protocols.messages.comparisons import Comparison, Estimate, lines_of, recommend, without_blend
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.tables import preprocessing
from tests.support.callbacks import ignore_step
from tests.support.tables import patients

MLP = {"model": "mlp", "hidden": "16", "epochs": 2, "batch_size": 32, "lr": 0.2}
TREES = {"model": "trees", "trees": 15, "depth": 3, "eta": 0.3}


# --- pure parts ------------------------------------------------------------------------------


def test_rounds_are_chosen_with_patience_and_then_trained_on_all_rows() -> None:
    rounds, fit = LocalRounds(10, patience=2), own_models.begin(1.0)
    for loss in (0.8, 0.7, float("nan"), 0.9):
        assert fit.phase == "choose"
        fit = own_models.after_round(fit, loss, rounds)
    assert fit == Fit("train", 0, 2, 0.7)
    fit = own_models.after_round(own_models.after_round(fit, 0, rounds), 0, rounds)
    assert fit.phase == "done"
    assert own_models.after_round(own_models.begin(1.0), 2.0, LocalRounds(1)).phase == "done", (
        "a model that no round makes better stays as it was"
    )


def test_the_interval_covers_the_difference_that_rows_share() -> None:
    chance = np.random.default_rng(1)
    hard = chance.gamma(2.0, size=400)  # some rows are hard for every model
    better, worse = hard + 0.1, hard + 0.2 + 0.01 * chance.normal(size=400)
    found = row_bootstrap.compare(
        "r", {"shared": {"loss": worse}, "alone": {"loss": better}}, {"alone": 3}
    )
    assert found is not None
    gain, shared = found.gains["alone"], found.models["shared"]
    assert gain.low < gain.value < gain.high
    assert gain.high - gain.low < 0.01 < shared.high - shared.low
    assert gain.value == pytest.approx(0.1, abs=0.005)
    assert found.recommended == "alone"


def test_the_root_of_squares_is_compared_and_a_loss_that_is_not_finite_is_not() -> None:
    squares = {"loss": np.full(50, 4.0), "mse": np.full(50, 4.0)}
    found = row_bootstrap.compare("r", {"shared": squares, "alone": squares}, {})
    assert found is not None
    assert (found.metric, found.models["alone"]) == ("rmse", Estimate(2.0, 2.0, 2.0))
    assert found.recommended == "shared"
    assert row_bootstrap.compare("r", {"shared": {"loss": np.array([np.inf] * 9)}}, {}) is None


def test_an_accuracy_of_few_rows_is_not_certain() -> None:
    right, wrong = np.ones(12), np.array([1.0] * 6 + [0.0] * 6)
    rows = {"shared": {"accuracy": right}, "alone": {"accuracy": wrong}}
    found = row_bootstrap.compare("r", rows, {})  # type: ignore[arg-type]
    assert found is not None
    # Of 12 of 12 and of 6 of 12, by R: prop.test(12, 12, correct = FALSE), prop.test(6, 12, …)
    shared, alone = found.models["shared"], found.models["alone"]
    assert (shared.value, shared.high) == (1.0, 1.0)
    assert shared.low == pytest.approx(0.7575, abs=1e-4)
    assert (alone.low, alone.high) == pytest.approx((0.2538, 0.7462), abs=1e-4)


def test_the_metric_of_the_run_decides_what_is_recommended() -> None:
    truth = np.array([0.0] * 180 + [1.0] * 20)
    never, often = np.zeros(200), np.array([0.0] * 160 + [1.0] * 40)  # 20 false alarms

    def told(guess: Any) -> dict[str, Any]:
        right = (guess == truth).astype(float)
        return {"loss": 1 - right, "accuracy": right, "class": truth, "guess": guess}

    rows: Any = {"shared": told(never), "alone": told(often)}
    plain = row_bootstrap.compare("r", rows, {})
    assert plain is not None
    assert (plain.metric, plain.recommended) == ("accuracy", "shared")
    found = row_bootstrap.compare("r", rows, {}, "balanced_accuracy")
    assert found is not None
    assert (found.metric, found.recommended) == ("balanced_accuracy", "alone")
    # A recall of 160 / 180 and of all 20.
    assert found.models["alone"].value == pytest.approx((160 / 180 + 1) / 2)
    assert found.gains["alone"].low > 0
    one_class: Any = {m: {n: v[:100] for n, v in of.items()} for m, of in rows.items()}
    rare = row_bootstrap.compare("r", one_class, {}, "auc")
    assert rare is not None
    assert rare.metric == "accuracy", "rows of one class have no area under the curve"


def test_an_area_under_the_curve_is_that_of_the_rows() -> None:
    truth, odds = np.array([0.0, 1.0] * 100), np.linspace(-4, 4, 200)
    both = {"loss": odds, "class": truth}
    good = np.where(truth == 1, 3.0, -3.0)
    rows: Any = {"shared": {**both, "log_odds": odds}, "alone": {**both, "log_odds": good}}
    found = row_bootstrap.compare("r", rows, {}, "auc")
    assert found is not None
    assert found.models["alone"] == Estimate(1.0, 1.0, 1.0)
    assert found.models["shared"].value == pytest.approx(0.505)
    lower = row_bootstrap.compare("r", rows, {}, "auc", lower_is_better=True)
    assert lower is not None
    assert (found.recommended, lower.recommended) == ("alone", "shared")


def test_a_choice_of_rounds_ends_when_its_time_is_over() -> None:
    fit, rounds = own_models.begin(1.0), LocalRounds(100)
    fit = own_models.after_round(fit, 0.9, rounds, 3.0, 5.0)
    assert (fit.phase, fit.is_cut) == ("choose", False)
    fit = own_models.after_round(fit, 0.8, rounds, 3.0, 5.0)
    assert fit == Fit("train", 0, 2, 0.8, 6.0, True)
    assert own_models.after_round(fit, 0.0, rounds, 9.0, 5.0).phase == "train"


def test_only_a_gain_beyond_its_interval_is_recommended() -> None:
    unsure, sure = Estimate(0.3, -0.01, 0.6), Estimate(0.1, 0.02, 0.2)
    assert recommend({"alone": unsure}) == "shared"
    assert recommend({"alone": unsure, "personal": sure}) == "personal"
    assert recommend({"alone": Estimate(0.2, 0.1, 0.3), "personal": sure}) == "alone"


def test_a_blend_needs_no_interval_but_no_loss_either() -> None:
    better, worse = Estimate(0.05, -0.2, 0.3), Estimate(-0.01, -0.2, 0.3)
    assert recommend({"alone": Estimate(0.3, -0.01, 0.6), "blend": better}) == "blend"
    assert recommend({"blend": worse}) == "shared"
    assert recommend({"alone": Estimate(0.2, 0.1, 0.3), "blend": better}) == "alone"


# --- on tables -------------------------------------------------------------------------------


class Site:
    """A peer with `own` rows, and the model of a run over `fleet`."""

    def __init__(self, folder: Path, fleet: Path, own: Path, rounds: int, **settings: Any) -> None:
        task, settings = Tabular(), {"seed": 3, "round": 1, "features": "a,b,c", **settings}
        task.load(DataSettings(path=str(fleet), device="cpu", min_count=1))
        made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
        settings["preprocessing"] = preprocessing.encode(made)
        version = task.init(3, settings)
        for number in range(1, rounds + 1):
            named = {**settings, "round": number}
            version = task.train_locally(version, named, ignore_step)
        self.base = folder / "shared.safetensors"
        weights.save(version, self.base)
        self.settings, self.own, self.folder = settings, own, folder
        self.said: list[Answer] = []

    def measure(
        self,
        place: str,
        slice_s: float,
        *,
        mu: float = 0.0,
        personal: str = "",
        most_s: float = 0.0,
        metric: str = "",
        others: Sequence[tuple[str, str]] = (),
        **floors: int,
    ) -> Comparison | None:
        (self.folder / place).mkdir(exist_ok=True)
        data = DataSettings(path=str(self.own), device="cpu", floors=Floors(**floors))
        work = Measure(
            task="tabular",
            settings=self.settings,
            data=data,
            run="tabular-1",
            base=str(self.base),
            folder=str(self.folder / place),
            rounds=8,
            slice_s=slice_s,
            mu=mu,
            personal=personal,
            most_s=most_s,
            metric=metric,
            others=[*others],
        )
        done = WorkExecutor(WorkControl(), self.said.append, 1).do(work)
        told = done.description
        return msgspec.json.decode(told, type=Comparison) if told else None


@pytest.mark.parametrize(("model", "rounds"), [(MLP, 4), (TREES, 15)], ids=["mlp", "trees"])
def test_a_peer_with_few_rows_gains_and_slices_change_nothing(
    tmp_path: Path, model: dict[str, Any], rounds: int
) -> None:
    fleet, own = patients(tmp_path / "fleet.csv", 600, 1), patients(tmp_path / "own.csv", 150, 2)
    site = Site(tmp_path, fleet, own, rounds, target="cost", **model)
    found = site.measure("whole", 60.0)
    assert found is not None
    assert (found.metric, found.rows) == ("rmse", 30)
    assert found.recommended != "alone"
    assert found.models["shared"].value < found.models["alone"].value
    if model is TREES:
        trees = weights.load(tmp_path / "whole" / "personal.safetensors")
        assert len(trees["feature"]) == 2 * TREES["trees"]
        assert int(trees["at"][0]) == TREES["trees"] + found.rounds["personal"]
    pieces = next(n for n in range(1, 200) if site.measure("slices", 0.0) is not None)
    assert pieces > 5
    assert site.measure("slices", 0.0) == found
    files = {file.name for file in (tmp_path / "slices").iterdir()}
    assert files == {
        f"{name}{end}" for name in found.rounds for end in (".safetensors", "-progress.json")
    } | {"blend.safetensors"}
    # No loss leaves with the progress: the agent passes losses of trainings on.
    progress = [one for one in site.said if isinstance(one, Progress)]
    assert progress
    assert {(one.phase, str(one.loss)) for one in progress} == {("evaluate", "nan")}


def test_a_peer_that_differs_is_told_to_use_a_model_of_its_own(tmp_path: Path) -> None:
    fleet = patients(tmp_path / "fleet.csv", 500, 1)
    own = patients(tmp_path / "own.csv", 500, 2, turn=-1.0)
    site = Site(tmp_path, fleet, own, 4, target="ill", **MLP)
    found = site.measure("whole", 60.0)
    assert found is not None
    assert found.metric == "accuracy"
    assert found.models["shared"].value < 0.2
    assert found.recommended != "shared"
    assert found.models["blend"].value > 0.8, "the shared model has no part in it"
    assert found.models[found.recommended].value > 0.8


@pytest.mark.attack("3", by="coordinator")
def test_nothing_that_leaves_depends_on_the_other_models_of_a_blend(tmp_path: Path) -> None:
    """Attack: have a machine train from a version that ends its comparison, or makes its numbers
    too large, if a row is held out there: whether a comparison leaves would tell the row, although
    no evaluation of the version was told."""
    own = patients(tmp_path / "own.csv", 150, 2)
    site = Site(tmp_path, own, own, 2, target="cost", **{**TREES, "model": "linear"})
    plain = site.measure("plain", 60.0)
    assert plain is not None
    assert "blend" in plain.models
    linear, task = weights.load(site.base), Tabular()
    task.load(DataSettings(path=str(own), device="cpu", min_count=1))
    trees = task.init(0, {**site.settings, **TREES})
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "huge": ("linear", {n: np.full_like(linear[n], 1e37) for n in linear}),
        "not a number": ("linear", {n: np.full_like(linear[n], np.nan) for n in linear}),
        "of another model": ("trees", dict(linear)),
        "of other sizes": ("trees", {**trees, "leaf": trees["leaf"][:, :, :1]}),
        "a blend of its own": ("trees", {"blend": np.ones(1), "0.trees.blend": np.ones(1)}),
        "no model": ("auto", dict(linear)),
    }
    for name, (kind, tensors) in wrong.items():
        file = tmp_path / "other.safetensors"
        weights.save(Weights(tensors), file)
        found = site.measure("plain", 60.0, others=[(str(file), kind)])
        assert found is not None, name
        assert without_blend(found) == without_blend(plain), name


def test_a_model_that_diverges_gives_no_comparison(tmp_path: Path) -> None:
    """Its numbers are larger than those of a message."""
    own = patients(tmp_path / "own.csv", 150, 2)
    site = Site(tmp_path, own, own, 1, target="cost", model="linear")
    linear = weights.load(site.base)
    weights.save(Weights({n: np.full_like(linear[n], 1e30) for n in linear}), site.base)
    with pytest.raises(DataError, match="too large or no numbers"):
        site.measure("whole", 60.0)


def test_ditto_keeps_the_personal_model_near_the_shared_one(tmp_path: Path) -> None:
    fleet = patients(tmp_path / "fleet.csv", 200, 1)
    own = patients(tmp_path / "own.csv", 200, 2, turn=-1.0)
    site = Site(tmp_path, fleet, own, 2, target="ill", model="linear", optimiser="sgd", epochs=1)
    shared = weights.load(site.base)

    def distance(place: str, mu: float) -> float:
        assert site.measure(place, 60.0, mu=mu) is not None
        made = weights.load(tmp_path / place / "personal.safetensors")
        return sum(float(np.square(made[name] - shared[name]).sum()) for name in shared)

    free, near = distance("finetune", 0.0), distance("ditto", 2.0)
    assert 0 < near < 0.6 * free


def test_layers_that_stayed_here_are_in_the_personal_model_alone(tmp_path: Path) -> None:
    own = patients(tmp_path / "own.csv", 200, 2)
    site = Site(tmp_path, own, own, 3, target="cost", **MLP)
    whole = weights.load(site.base)
    head = {name: whole[name] for name in whole if name.startswith("output")}
    weights.save(Weights(head), tmp_path / "mine.kept")
    weights.save(Weights({n: whole[n] for n in whole if n not in head}), site.base)
    site.settings["at_home"] = "output.*"
    found = site.measure("whole", 60.0, personal=str(tmp_path / "mine.kept"))
    assert found is not None
    assert found.models["shared"].value > 1.5 * found.models["personal"].value
    assert "blend" not in found.models, "no other model is whole"
    made = weights.load(tmp_path / "whole" / "personal.safetensors")
    assert made.schema == whole.schema


@pytest.mark.parametrize("model", [MLP, TREES], ids=["mlp", "trees"])
def test_training_that_takes_too_long_is_cut_and_rows_tell_each_metric(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    own = patients(tmp_path / "own.csv", 200, 2)
    site = Site(tmp_path, own, own, 3, target="ill", **model)
    found = site.measure("cut", 60.0, most_s=1e-9, metric="auc")
    assert found is not None
    assert (found.metric, found.cut) == ("auc", ("alone", "personal"))
    assert set(found.rounds.values()) <= {0, 1}
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in found.models.values())
    assert "training of alone and personal was cut" in lines_of(found)[-1]


@pytest.mark.attack("3", by="coordinator")
def test_no_metric_tells_of_a_few_rows_of_a_class(tmp_path: Path) -> None:
    """Attack: ask for a comparison by the mean recall of classes, of which one has few rows."""
    own = patients(tmp_path / "own.csv", 200, 2)
    site = Site(tmp_path, own, own, 1, target="ill", **MLP)
    for place, least, metric in (("few", 15, "balanced_accuracy"), ("fewer", 25, "accuracy")):
        found = site.measure(place, 60.0, metric="balanced_accuracy", min_count=least)
        assert found is not None
        assert found.metric == metric


def test_too_few_held_out_rows_are_said(tmp_path: Path) -> None:
    own = patients(tmp_path / "own.csv", 100, 2)
    site = Site(tmp_path, own, own, 1, target="ill", **MLP)
    with pytest.raises(DataError, match="needs 21 held-out rows, and there are 20"):
        site.measure("whole", 60.0, min_count=21)
