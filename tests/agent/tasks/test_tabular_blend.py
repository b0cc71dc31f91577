"""Blends of models of tables: their weights, their file, and what predictions make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings
from agent.tasks import blend_weights
from agent.tasks.capabilities import Member
from agent.tasks.tabular import Tabular
from agent.tasks.tabular_blend import Blend, weigh
from protocols.errors import BadWeights, UsageError
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.tables import preprocessing
from tests.support.tables import patients


def _ignore(*_: object) -> None:
    """A step."""


def test_weights_of_numbers_have_the_least_error() -> None:
    chance = np.random.default_rng(1)
    truth = chance.normal(size=5000)
    predicted = truth + chance.normal(size=(4, 5000)) * np.array([[0.3], [0.4], [3.0], [0.3]])
    predicted[3] = predicted[0] + 2.0  # of no use
    found = blend_weights.of_numbers(predicted, truth)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    # Independent errors count by the inverse of their variance.
    assert found[:2] == pytest.approx([0.64, 0.36], abs=0.03)
    assert found[2:].max() < 0.02

    def error(shares: Any) -> float:
        return float(np.mean((shares @ predicted - truth) ** 2))

    tried = chance.dirichlet(np.ones(4), 3000)
    assert error(found) <= min(map(error, tried)) + 1e-4


def test_weights_of_classes_have_the_highest_likelihood() -> None:
    chance = np.random.default_rng(2)
    good = chance.uniform(0.5, 0.95, 4000)
    chances = np.stack([good, 1 - good, np.where(chance.random(4000) < 0.5, good, 0.01)])
    found = blend_weights.of_classes(chances)
    assert found == pytest.approx([1, 0, 0], abs=0.01)
    by_row = np.zeros(4000)
    assert blend_weights.of_classes(chances, by_row) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("of", ["numbers", "classes"])
def test_few_rows_leave_the_weights_nearly_equal(of: str) -> None:
    truth = np.array([1.0, -1.0, 0.5])
    predicted = np.stack([truth + 0.1, truth - 1.0])
    if of == "numbers":
        few = blend_weights.of_numbers(predicted[:, :1], truth[:1])
        many = blend_weights.of_numbers(np.tile(predicted, 500), np.tile(truth, 500))
    else:
        chances = np.array([[0.9, 0.8], [0.3, 0.2]])
        few = blend_weights.of_classes(chances[:, :1])
        many = blend_weights.of_classes(np.tile(chances, 500))
    assert 0.5 < few[0] < 0.85
    assert many[0] > 0.9


def site(folder: Path, target: str) -> tuple[Tabular, dict[str, Any], list[Member]]:
    """A task with its table, and two models."""
    task = Tabular()
    task.load(
        DataSettings(path=str(patients(folder / "own.csv", 300, 1)), device="cpu", min_count=1)
    )
    settings: dict[str, Any] = {"target": target, "model": "linear", "trees": 5, "depth": 2}
    made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
    settings["preprocessing"] = preprocessing.encode(made)
    members = []
    for kind in ("linear", "mlp", "trees"):
        of = {**settings, "model": kind}
        version = task.init(0, of)
        for number in range(1, 4):
            version = task.train_locally(version, {**of, "round": number}, _ignore)
        members.append(Member(kind, version))
    return task, settings, members


@pytest.mark.parametrize("target", ["ill", "cost"])
def test_a_blend_predicts_the_mean_of_its_models(tmp_path: Path, target: str) -> None:
    task, settings, members = site(tmp_path, target)
    made = task.blend_models(members, settings, _ignore)
    assert made is not None
    file = tmp_path / "blend.safetensors"
    weights.save(made[0], file)
    whole, read = weights.load(file), Blend.read(weights.load(file))
    assert read is not None
    assert [one.kind for one in read.members] == ["linear", "mlp", "trees"]
    x = next(iter(task.inputs(str(tmp_path / "own.csv"), task._read(settings))))
    outputs = [task._ready(w, {**settings, "model": kind})(x).detach() for kind, w in members]
    mean = task._ready(whole, settings)(x).detach()
    if target == "ill":
        outputs, mean = [one.softmax(1) for one in outputs], mean.softmax(1)
    wanted = sum(s * one for s, one in zip(read.shares.tolist(), outputs, strict=True))
    np.testing.assert_allclose(mean.numpy(), np.asarray(wanted), atol=1e-5)
    answers = [*task.predict(whole, settings, str(tmp_path / "own.csv"))]
    assert sum(len(batch[target]) for batch in answers) == 300
    # The numbers of each row are those of the rows of the other models, in this order.
    alone = task.measure_rows(members[0].weights, settings, _ignore, aside=False)
    assert made[1].keys() == alone.keys()
    if target == "ill":
        np.testing.assert_array_equal(made[1]["class"], alone["class"])
    with pytest.raises(UsageError, match="a blend of several models has no form for XGBoost"):
        task.export(whole, settings, "xgboost", DataSettings(), tmp_path / "out.json")


def test_a_model_that_diverged_is_in_no_blend(tmp_path: Path) -> None:
    task, settings, members = site(tmp_path, "ill")
    broken = Weights(
        {name: np.full_like(members[0].weights[name], np.nan) for name in members[0].weights}
    )
    other = Member("mlp", members[0].weights)  # of another kind than it says
    made = task.blend_models([*members, Member("linear", broken), other], settings, _ignore)
    assert made is not None
    found = Blend.read(made[0])
    assert found is not None
    assert len(found.members) == 3
    assert task.blend_models([members[0], Member("linear", broken)], settings, _ignore) is None


def test_no_row_has_a_part_in_the_weights_of_its_own_output() -> None:
    """One row that only the second model predicts: its output is made as if it were not there."""
    import torch

    truth = np.array([[0.0]] * 40 + [[50.0]], np.float32)
    first = torch.zeros(41, 1)
    second = torch.from_numpy(truth * 1.0) + torch.tensor([[1.0]] * 40 + [[0.0]])
    shares, mean = weigh([first, second], truth)
    assert shares[1] > 0.9, "the weights of all rows know it"
    assert mean[-1] < 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"blend": np.array([0.5, 0.6])},
        {"blend": np.array([1.5, -0.5])},
        {"blend": np.array([np.nan, 1.0])},
        {"blend": np.array([1.0])},
        {"blend": np.array([0.5, 0.5]), "0.pickle.x": np.zeros(1)},
        {"blend": np.array([0.5, 0.5]), "x": np.zeros(1)},
    ],
)
def test_a_damaged_blend_is_refused(wrong: dict[str, Any]) -> None:
    tensors = {"0.linear.x": np.zeros(1), "1.mlp.x": np.zeros(1), **wrong}
    with pytest.raises(BadWeights, match="blend"):
        Blend.read(Weights(tensors))
