"""The model "trees" of the task tabular, on tables of one peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings
from agent.tasks.tabular import Tabular
from agent.tasks.tabular_trees import TreeModel
from protocols.errors import UsageError
from protocols.model.weights import Weights
from protocols.privacy.private_training import PrivateTraining
from protocols.tables import preprocessing
from protocols.tables.trees import growth, layout
from tests.support.callbacks import ignore_step
from tests.support.tables import write_csv

TREES = {"model": "trees", "trees": 12, "depth": 3, "bins": 16, "eta": 0.3}


def clinic(folder: Path, rows: int = 400) -> Path:
    """Patients who are ill above 60, and at any age in ward c; some ages are missing."""
    rng = np.random.default_rng(0)
    table = []
    for _ in range(rows):
        age, ward = int(rng.integers(20, 90)), "abc"[rng.integers(3)]
        ill = age > 60 or ward == "c"
        cost = 3 * age + (100 if ward == "c" else 0) + rng.normal()
        told = "" if rng.random() < 0.1 else age
        table.append({"age": told, "ward": ward, "ill": "ny"[ill], "cost": f"{cost:.2f}"})
    return write_csv(folder / "clinic.csv", table)


def grown(
    path: Path, target: str, features: str, **more: Any
) -> tuple[Tabular, dict[str, Any], Weights]:
    """A task, its settings, and the version after all rounds of this peer alone."""
    settings: dict[str, Any] = {**TREES, "target": target, "features": features, **more}
    task = Tabular()
    task.load(DataSettings(path=str(path), device="cpu", min_count=1))
    made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
    settings["preprocessing"] = preprocessing.encode(made)
    version, state = task.init(0, settings), dict[str, Any]()
    shape = layout.Shape.of(version.schema)
    for _ in range(1 + TREES["trees"] * TREES["depth"]):  # type: ignore[operator]
        trained, rows, metrics = task.train(version, settings, ignore_step)
        assert metrics == {}
        assert task.sums_schema(version, settings) == Weights(trained).schema
        place = layout.read(version, shape)
        sums = np.asarray(trained["sums"])
        arrays, state = growth.grow(version, place, state, sums, rows, bytes(32))
        version = Weights(arrays)
    return task, settings, version


def test_classes_are_learnt_predicted_and_exported(tmp_path: Path) -> None:
    path = clinic(tmp_path)
    task, settings, version = grown(path, "ill", "age,ward")
    count, metrics, tallies = task.evaluate(version, settings, ignore_step)
    assert count == 80
    assert metrics["accuracy"] > 0.93  # some ages are missing
    assert tallies.keys() == {"confusion", "calibration", "scores"}
    new = write_csv(
        tmp_path / "new.csv",
        [{"age": age, "ward": ward} for age, ward in ((30, "a"), (80, "b"), (30, "c"), (30, "z"))],
    )
    (told,) = task.predict(version, settings, str(new))
    assert told["ill"][:3] == ["n", "y", "y"]
    assert all(0.5 <= chance <= 1 for chance in told["probability"])
    out = tmp_path / "trees.json"
    task.export(version, settings, "xgboost", DataSettings(), out)
    assert b'"binary:logistic"' in out.read_bytes()
    with pytest.raises(UsageError, match="only trees"):
        task.export(version, {**settings, "model": "linear"}, "xgboost", DataSettings(), out)


def test_numbers_are_learnt_in_their_own_units(tmp_path: Path) -> None:
    path = clinic(tmp_path)
    task, settings, version = grown(path, "cost", "age,ward", kind="regression")
    _, metrics, tallies = task.evaluate(version, settings, ignore_step)
    assert metrics["mse"] < 25**2
    assert tallies.keys() == {"regression"}
    (told,) = task.predict(version, settings, str(path))
    assert 150 < float(np.mean(told["cost"])) < 250


def test_what_trees_cannot_do_is_said(tmp_path: Path) -> None:
    path = clinic(tmp_path)
    task, settings, version = grown(path, "ill", "age,ward")
    with pytest.raises(UsageError, match="objective"):
        task.schema({**settings, "objective": "poisson"})
    task.protect(PrivateTraining(3.0, 1e-5, 1.0, 10))
    with pytest.raises(UsageError, match="noise"):
        task.train(version, settings, ignore_step)
    assert task.snapshot().arrays == {}  # a step of trees has no position


def test_a_target_of_very_many_classes_is_refused() -> None:
    target = preprocessing.Target(name="y", kind="text", classes=tuple(map(str, range(101))))
    feature = preprocessing.Feature(name="x", kind="number")
    made = preprocessing.Preprocessing(features=(feature,), target=target)
    with pytest.raises(UsageError, match="101 classes"):
        TreeModel.of(made, {})
