"""Trees of a run as a model of XGBoost: it loads, and predicts the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost

from agent.data import features
from agent.data.features import EncodedRows
from agent.tasks.tabular_trees import TreeModel
from protocols.model.built_in_settings import BY_TASK
from protocols.model.weights import Weights
from protocols.tables.preprocessing import Feature, Preprocessing, Target
from tests.support.tree_peers import Array, Forest, grow

ROWS = 600
FEATURES = (
    Feature(name="age", kind="number", mean=50, scale=15, missing=True),
    Feature(name="dose", kind="number", mean=2, scale=3),
    Feature(name="ward", kind="text", categories=tuple("abcdefghijklmnopqrst")),
    Feature(name="sex", kind="text", categories=("f", "m")),
)
TARGETS: dict[str, tuple[Target, str]] = {
    "logistic": (Target(name="y", kind="text", classes=("no", "yes")), "auto"),
    "multiclass": (Target(name="y", kind="text", classes=("a", "b", "c")), "auto"),
    "squared": (Target(name="y", kind="number", mean=1, scale=0.8), "squared"),
    "poisson": (Target(name="y", kind="number", mean=3, scale=2), "poisson"),
}


def table() -> tuple[pa.RecordBatch, Array]:
    """The rows as they are in a file, and as XGBoost takes them."""
    rng = np.random.default_rng(0)
    age = np.where(rng.random(ROWS) < 0.2, np.nan, rng.normal(50, 15, ROWS))
    dose = rng.gamma(1, 3, ROWS).round(1)
    ward = rng.integers(0, 22, ROWS)  # 20 and 21 are in no vocabulary
    sex = rng.integers(0, 2, ROWS).astype(float)
    sex[rng.random(ROWS) < 0.1] = np.nan
    batch = pa.record_batch(
        {
            "age": pa.array(age, from_pandas=True),
            "dose": pa.array(dose),
            "ward": ["abcdefghijklmnopqrstuv"[n] for n in ward],
            "sex": [None if np.isnan(n) else "fm"[int(n)] for n in sex],
        }
    )
    return batch, np.stack([age, dose, ward, sex], 1)


@pytest.mark.parametrize("kind", TARGETS)
def test_xgboost_predicts_what_the_trees_do(tmp_path: Path, kind: str) -> None:
    target, objective = TARGETS[kind]
    made = Preprocessing(features=FEATURES, target=target)
    chosen: dict[str, Any] = {name: spec.default for name, spec in BY_TASK["tabular"].items()}
    model = TreeModel.of(
        made, chosen | {"objective": objective, "trees": 8, "depth": 4, "bins": 12}
    )
    batch, columns = table()
    x = features.encode_inputs(batch, made)
    rng = np.random.default_rng(1)
    score = np.nan_to_num(columns[:, 0], nan=70) / 30 + columns[:, 2] % 3 - columns[:, 1] / 3
    if target.classes:
        y = np.clip((score + rng.normal(size=ROWS)).astype(int), 0, len(target.classes) - 1)
    else:
        raw = np.maximum(score + rng.normal(size=ROWS), 0).round()
        y = ((raw - target.mean) / target.scale).astype(np.float32)[:, None]
    forest = Forest(model.shape, model.numbers, model.objective, model.first()["kinds"])
    rows = model.rows(EncodedRows(x, y), 1)
    version = grow(forest, [rows], [ROWS], masked=True)
    assert {0, 1, 2} <= set(version["feature"].reshape(-1).tolist())

    file = tmp_path / "trees.json"
    file.write_bytes(model.to_json(Weights(version)))
    booster = xgboost.Booster(model_file=file)
    types = ["float", "float", "c", "c"]
    names = [feature.name for feature in FEATURES]
    columns[columns[:, 2] > 19, 2] = 20
    data = xgboost.DMatrix(
        columns, feature_names=names, feature_types=types, enable_categorical=True
    )
    theirs = booster.predict(data, output_margin=True).reshape(ROWS, -1)
    margins = model.margins(version, model.slots(x))
    if kind == "squared":
        margins = margins * target.scale + target.mean
    if kind == "multiclass":
        margins = margins + 0.5
    assert np.abs(theirs - margins).max() < 1e-4 * np.abs(margins).max()
