"""`cw.SklearnTask`: a round is the estimator's own `partial_fit`, and averages of peers learn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from msgspec import structs

import commonweight as cw
from agent.data.settings import DataSettings
from agent.tasks import Task
from agent.tasks.training.seeds import random_state
from agent.tasks.work import Measure
from agent.trainer import own_models
from protocols.errors import DataError, TaskUnusable, UnknownName, UsageError
from protocols.messages.comparisons import Comparison
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.callbacks import ignore_step
from tests.support.fleet_harness import ROOT

metrics = pytest.importorskip("sklearn.metrics")
linear_model = pytest.importorskip("sklearn.linear_model")
neural_network = pytest.importorskip("sklearn.neural_network")

FEATURES = 5


def rows(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(1)
    x = chance.normal(size=(count, FEATURES)).astype(np.float32)
    return x, x @ chance.normal(size=(FEATURES, 3))


class Made(cw.SklearnTask):
    estimator: ClassVar[Any] = staticmethod(lambda: linear_model.SGDRegressor(random_state=0))

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.load(DataSettings(index=index))

    def model(self, settings: Any) -> Any:
        return self.estimator()

    def data(self, source: DataSettings, settings: Any) -> Any:
        x, scores = rows()
        y = scores.argmax(1) if self.classes else scores[:, 0]
        mine = np.arange(len(y)) % 2 == source.index
        return (x[mine][:120], y[mine][:120]), (x[mine][120:], y[mine][120:])


class Classes(Made):
    classes = (0, 1, 2)
    estimator = staticmethod(lambda: linear_model.SGDClassifier(loss="log_loss", random_state=0))


class Two(Classes):
    classes = (False, True)

    def data(self, source: DataSettings, settings: Any) -> Any:
        return tuple((x, x[:, 0] > 0) for x, _ in super().data(source, settings))


class Margin(Classes):
    estimator = staticmethod(lambda: linear_model.Perceptron(random_state=0))


class Net(Classes):
    estimator = staticmethod(
        lambda: neural_network.MLPClassifier((8,), learning_rate_init=0.02, random_state=0)
    )


class NetOfNumbers(Made):
    estimator = staticmethod(
        lambda: neural_network.MLPRegressor(
            hidden_layer_sizes=(8,), learning_rate_init=0.02, random_state=0
        )
    )


KINDS: list[type[Made]] = [Made, Classes, Two, Margin, Net, NetOfNumbers]


def train(task: Made, version: Weights, number: int) -> Weights:
    found = task.train(version, {"seed": 1, "round": number, "epochs": 3}, lambda *_: None).weights
    assert isinstance(found, Weights)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_peers_learn_by_averages(kind: type[Made]) -> None:
    peers = [kind(0), kind(1)]
    assert isinstance(peers[0], Task)
    first = version = peers[0].init(0, {})
    assert version.schema == peers[1].schema({})
    for number in range(1, 9):
        found = [train(peer, version, number) for peer in peers]
        version = Weights({n: (found[0][n] + found[1][n]) / np.float32(2) for n in version})
    before, after = (
        peers[0].evaluate(each, {}, lambda *_: None).metrics for each in (first, version)
    )
    assert after["loss"] < before["loss"] / 2
    assert after.get("accuracy", 1.0) > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_give_the_same_bytes(kind: type[Made]) -> None:
    first = kind().init(3, {})
    assert weights.digest(kind().init(3, {})) == weights.digest(first)
    assert weights.digest(train(kind(), first, 2)) == weights.digest(train(kind(), first, 2))


def test_a_round_is_partial_fit_over_batches() -> None:
    task, told = Made(), list[tuple[Any, ...]]()
    first = task.init(0, {})
    settings = {"epochs": 2, "batch_size": 50, "min_batch": 30, "seed": 1, "round": 1}
    made = task.train(first, settings, lambda *words: told.append(words))  # type: ignore[arg-type]
    assert [words[3] for words in told] == [50, 120, 170, 240]  # the last batch has 70
    plain = linear_model.SGDRegressor(random_state=0)
    (x, y), _ = task.data(DataSettings(), {})
    for epoch in range(2):
        order = random_state("order", 1, 1, 0, epoch).permutation(120)
        for batch in (order[:50], order[50:]):
            plain.partial_fit(x[batch].astype(np.float64), y[batch])
    np.testing.assert_allclose(made.weights["coef"], plain.coef_, rtol=1e-5)


@pytest.mark.parametrize("kind", [Classes, Net, Made, Margin])
def test_predictions_need_no_data(kind: type[Made], tmp_path: Path) -> None:
    version = train(kind(), kind().init(0, {}), 1)

    class Blind(kind):  # type: ignore[misc, valid-type]
        def data(self, source: DataSettings, settings: Any) -> Any:
            raise AssertionError

    np.save(tmp_path / "x.npy", rows()[0][:7])
    (answer,) = Blind().predict(version, {}, str(tmp_path / "x.npy"))
    assert list(answer["row"]) == list(range(7))
    expected = {Made: {"row", "value"}, Margin: {"row", "class"}}
    assert answer.keys() == expected.get(kind, {"row", "class", "probability"})
    table = np.column_stack([rows()[0][:7], np.zeros(7)])
    for name, head in (("x.csv", "a,b,c,d,e,class"), ("odd.csv", "a,b,c,d,e,f")):
        np.savetxt(tmp_path / name, table, delimiter=",", header=head, comments="", fmt="%.9g")
    (same,) = Blind().predict(version, {}, str(tmp_path / "x.csv"))
    assert same == answer
    with pytest.raises(DataError, match="cannot take the 6 columns of the table"):
        list(Blind().predict(version, {}, str(tmp_path / "odd.csv")))


class Forest(Made):
    estimator = staticmethod(lambda: linear_model.Ridge())


class Flat(Made):
    def data(self, source: DataSettings, settings: Any) -> Any:
        return (np.zeros(3), np.zeros(3)), (np.zeros(3), np.zeros(3))


class Unknown(Classes):
    classes = (0, 1)


@pytest.mark.parametrize(
    ("task", "settings", "error", "words"),
    [
        (Forest(), {}, TaskUnusable, "Ridge has no partial_fit"),
        (Flat(), {}, UsageError, "are no examples"),
        (Unknown(), {}, DataError, "not one of `classes`"),
        (Made(), {"epochs": 0}, UsageError, "epochs cannot be 0"),
        (Made(), {"lr": 0.1}, UnknownName, "no setting 'lr'"),
    ],
)
def test_what_cannot_be_trained_is_said(
    task: Made, settings: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        task.init(0, settings)


def test_it_needs_no_torch() -> None:
    code = "import sys, commonweight as cw; cw.SklearnTask; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_setting_is_told_with_its_bounds_and_help() -> None:
    told = Made().setting_specs()
    assert {"epochs", "batch_size"} <= told.keys()
    assert all(told[name].ge == 1 and told[name].help for name in ("epochs", "batch_size"))


@pytest.mark.parametrize("kind", [Made, Classes, Two], ids=["numbers", "classes", "two"])
def test_a_peer_compares_estimators_on_its_held_out_rows(kind: type[Made], tmp_path: Path) -> None:
    task, settings = kind(), {"epochs": 2, "seed": 1, "round": 1}
    first = task.init(1, settings)
    shared = task.train(first, settings, ignore_step).weights
    given = {"task": "made", "run": "made-1", "settings": {}, "base": "", "rounds": 6}
    work = Measure(**given, folder=str(tmp_path), slice_s=60.0)
    done = own_models.compare(
        work, task, dict(settings), (shared, shared), lambda seed: first, ignore_step
    )
    found = msgspec.json.decode(done.description, type=Comparison)
    x, y = task.data(DataSettings(), settings)[1]
    evaluated = task.evaluate(shared, settings, ignore_step).metrics
    expected = np.sqrt(evaluated["loss"]) if kind is Made else evaluated["accuracy"]
    assert (found.rows, found.metric) == (len(y), "rmse" if kind is Made else "accuracy")
    assert found.models["shared"].value == pytest.approx(expected)
    assert found.rounds["alone"] > 0, "training on four fifths of its rows has helped"
    assert task.train(first, settings, ignore_step).num_examples == 120, "nothing is left aside"
    if kind is Two:
        asked = structs.replace(work, metric="auc", folder=str(tmp_path / "auc"))
        (tmp_path / "auc").mkdir()
        done = own_models.compare(
            asked, task, dict(settings), (shared, shared), lambda seed: first, ignore_step
        )
        auc = msgspec.json.decode(done.description, type=Comparison).models["shared"].value
        odds = task._loaded(shared, settings).decision_function(x)
        assert auc == pytest.approx(metrics.roc_auc_score(y, odds), abs=1e-6)


def test_no_step_of_an_estimator_stays_near_a_version() -> None:
    task = Classes()
    task.pull_to(None, 0.0)
    with pytest.raises(UsageError, match="cannot be kept near"):
        task.pull_to(task.init(0, {}), 1.0)
