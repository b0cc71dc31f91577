"""The task tabular: rows become numbers by rule, and a federation learns what the union would."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from sklearn import datasets

from agent.data import features
from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.tasks import Settings
from agent.tasks.tabular import Tabular
from benchmarks.speed.analyze import made
from protocols.errors import DataError, SchemaMismatch, UnknownName, UsageError
from protocols.model.weights import Array
from protocols.tables import preprocessing
from protocols.tables.preprocessing import Feature, Preprocessing, Target
from protocols.tables.statistics import hash_category
from tests.support.callbacks import ignore_step
from tests.support.tables import MIXED, mixed, write_csv

SHARES = (0.4, 0.25, 0.2, 0.1, 0.05)
Weights = dict[str, Array]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- rows become numbers ---------------------------------------------------------------------

RULES = Preprocessing(
    features=(
        Feature(name="age", kind="number", mean=40, scale=10, missing=True),
        Feature(name="city", kind="text", categories=("Basel", "Bern")),
        Feature(name="gone", kind="number", mean=3, scale=2),
        Feature(name="member", kind="boolean", mean=0.5, scale=0.5),
        Feature(name="since", kind="date", mean=10, scale=5),
    ),
    target=Target(name="label", kind="text", classes=("no", "yes")),
)


def test_the_rules_of_the_preprocessing() -> None:
    batch = pa.record_batch(
        {
            "since": ["1970-01-11", "1970-01-21", "", ""],
            "city": ["Bern", " Basel", "Genf", "n/a"],
            "member": ["true", "FALSE", "", "true"],
            "age": ["50", "", "inf", "30"],
            "label": ["yes", "no", "perhaps", ""],
        }
    )
    found = features.encode_inputs(batch, RULES)
    assert features.input_width(RULES) == (5, 1)
    #               age gone member since  missing  city
    assert found.tolist() == [
        [1, 0, 1, 0, 0, 3],
        [0, 0, -1, 2, 1, 2],
        [0, 0, 0, 0, 1, 1],
        [-1, 0, 1, 0, 0, 0],
    ]
    assert features.encode_targets(batch, RULES).tolist() == [1, 0, -1, -1]


def test_hashed_categories_are_found_again() -> None:
    city = Feature(name="city", kind="text", categories=(hash_category("city", "Bern"),))
    rules = Preprocessing(features=(city,), target=RULES.target, hashed=True)
    batch = pa.record_batch({"city": ["Bern", "Genf", None, "Bern"]})
    assert features.encode_inputs(batch, rules)[:, 0].tolist() == [2, 1, 0, 2]


def test_rows_beyond_memory_lie_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "a.csv", MIXED)
    kept = loaded(path, {"target": "label"}, cache=str(tmp_path))
    monkeypatch.setattr(features, "IN_MEMORY_BYTES", 1000)
    spilt = loaded(path, {"target": "label"}, cache=str(tmp_path))
    for one, other in zip(rows_of(kept), rows_of(spilt), strict=True):
        assert isinstance(other.x, np.memmap)
        assert np.array_equal(one.x, other.x)
        assert np.array_equal(one.y, other.y)
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
    assert sum(len(rows.y) for rows in rows_of(kept)) == len(MIXED)
    assert len(rows_of(kept)[1].y) == len(MIXED) // features.HELD_OUT_OF


def test_a_table_with_enough_rows_of_each_value_is_used_as_it_is(tmp_path: Path) -> None:
    """The rule for values of few rows changes nothing, neither in training nor in evaluation."""
    path = write_csv(tmp_path / "a.csv", mixed(800))
    ruled, settings = loaded(path, {"target": "label"}, min_count=5)
    free, _ = loaded(path, {"target": "label"}, min_count=1)
    for one, other in zip(rows_of((ruled, settings)), rows_of((free, settings)), strict=True):
        assert np.array_equal(one.x, other.x)
        assert np.array_equal(one.y, other.y)
        assert (one.x.std(axis=0) > 0).all()


def loaded(path: Path, settings: Settings, **data: Any) -> tuple[Tabular, Settings]:
    """A task with the preprocessing of its own table alone."""
    task = Tabular()
    task.load(DataSettings(path=str(path), device="cpu", **({"min_count": 1} | data)))
    made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
    return task, {**settings, "preprocessing": preprocessing.encode(made)}


def rows_of(loaded: tuple[Tabular, Settings]) -> tuple[EncodedRows, EncodedRows]:
    task, settings = loaded
    trained_on, held_out = task._sets(settings)
    return trained_on, held_out


# --- a federation and the union --------------------------------------------------------------


class Federation:
    """Peers in this process, averaged by examples; and the same model on all their rows."""

    def __init__(self, tasks: list[Tabular], made: Preprocessing, settings: Settings) -> None:
        self.tasks, self.preprocessing, self.settings = tasks, made, settings

    @classmethod
    def of(cls, paths: Sequence[Path], settings: Settings, min_count: int = 5) -> Federation:
        tasks = [Tabular() for _ in paths]
        for index, (task, path) in enumerate(zip(tasks, paths, strict=True)):
            data = DataSettings(path=str(path), index=index, device="cpu", min_count=min_count)
            task.load(data)
        tables = {str(n): task.survey(settings) for n, task in enumerate(tasks)}
        made = preprocessing.derive(tables, settings).preprocessing
        shared = {"preprocessing": preprocessing.encode(made), "seed": 0}
        return cls(tasks, made, {**settings, **shared})

    def train(self, rounds: int) -> dict[str, float]:
        weights = dict(self.tasks[0].init(0, self.settings))
        for number in range(1, rounds + 1):
            settings = {**self.settings, "round": number}
            made = [task.train(weights, settings, ignore_step) for task in self.tasks]  # type: ignore[arg-type]
            total = sum(outcome.num_examples for outcome in made)
            weights = {
                name: sum(
                    np.asarray(one.weights[name], np.float64) * (one.num_examples / total)
                    for one in made
                ).astype(np.float32)  # type: ignore[union-attr]
                for name in weights
            }
        told = [task.evaluate(weights, self.settings, ignore_step) for task in self.tasks]  # type: ignore[arg-type]
        total = sum(outcome.num_examples for outcome in told)
        return {
            name: sum(one.metrics[name] * one.num_examples for one in told) / total
            for name in told[0].metrics
        }

    def union(self) -> Federation:
        parts = [task._sets(self.settings) for task in self.tasks]
        whole = Tabular()
        whole.load(DataSettings(path="x", device="cpu"))
        rows = [
            EncodedRows(
                np.concatenate([p[kind].x for p in parts]),
                np.concatenate([p[kind].y for p in parts]),
            )
            for kind in (0, 1)
        ]
        whole.data = lambda source, settings: rows  # type: ignore[assignment]
        return Federation([whole], self.preprocessing, self.settings)


def skewed(folder: Path, name: str) -> tuple[list[Path], npt.NDArray[np.float64], list[str]]:
    """A table of scikit-learn in five files of very different sizes and orders of columns."""
    raw = {"scaled": False} if name == "diabetes" else {}
    found = getattr(datasets, f"load_{name}")(**raw)
    names = [str(feature).replace(" ", "_") for feature in found.feature_names]
    chance = np.random.default_rng(0)
    order = chance.permutation(len(found.target))
    cuts = (np.cumsum(SHARES[:-1]) * len(order)).astype(int)
    paths = []
    for number, rows in enumerate(np.split(order, cuts)):
        columns = [*chance.permutation(names), "target"]
        table = [
            {**dict(zip(names, found.data[row].tolist(), strict=True)), "target": found.target[row]}
            for row in rows
        ]
        paths.append(write_csv(folder / f"{name}{number}.csv", table, columns))
    return paths, found.data, names


@pytest.mark.parametrize(
    ("name", "model", "rounds"),
    [("breast_cancer", "mlp", 12), ("diabetes", "linear", 15), ("digits", "linear", 15)],
)
def test_five_skewed_peers_learn_what_the_union_does(
    tmp_path: Path, name: str, model: str, rounds: int
) -> None:
    paths, union, names = skewed(tmp_path, name)
    # Some pixels of the digits are not 0 in a few rows of a peer only.
    federation = Federation.of(paths, {"target": "target", "model": model}, min_count=1)
    cards = [task.traits(federation.settings) for task in federation.tasks]
    assert all(card == cards[0] for card in cards)
    # The shared preprocessing is the union's own, though no row was told.
    for feature in federation.preprocessing.features:
        column = union[:, names.index(feature.name)]
        assert feature.mean == pytest.approx(column.mean(), rel=1e-9, abs=1e-12)
        assert feature.scale == pytest.approx(column.std() or 1.0, rel=1e-9)
    told, central = federation.train(rounds), federation.union().train(rounds)
    if "accuracy" in told:
        assert told["accuracy"] >= central["accuracy"] - 0.02
        assert told["accuracy"] > 0.9
    else:
        assert told["mse"] ** 0.5 <= 1.05 * central["mse"] ** 0.5
        assert told["loss"] < 0.7, "it explains more than the mean"


@pytest.mark.long
def test_a_peer_for_each_carrier_learns_the_delay_as_the_union_does(tmp_path: Path) -> None:
    """Flights by carrier, from a third of all to some dozens; every table has another order."""
    chance, paths = np.random.default_rng(0), []
    flights = made(30_000)[["month", "dep_delay", "distance", "origin", "arr_delay", "carrier"]]
    for carrier, part in flights.groupby("carrier"):
        if len(part) >= 30:
            columns = chance.permutation(part.columns.drop("carrier"))
            paths.append(tmp_path / f"{carrier}.csv")
            part[columns].dropna().to_csv(paths[-1], index=False)
    assert len(paths) >= 12
    chosen = {"target": "arr_delay", "model": "linear", "epochs": 2}
    federation = Federation.of(paths, chosen)
    told, central = federation.train(8), federation.union().train(8)
    assert told["mse"] ** 0.5 <= 1.05 * central["mse"] ** 0.5
    spread = float(flights.arr_delay.std())
    assert told["mse"] ** 0.5 < 0.8 * spread, "it explains more than the mean"
    # The figures in docs/tables.md.
    sizes = flights.carrier.value_counts()
    sizes = sizes[sizes >= 30]
    assert (len(flights), len(sizes), sizes.min(), sizes.max()) == (30_000, 14, 54, 5202)
    assert told["mse"] ** 0.5 == pytest.approx(17.87, abs=0.05)
    assert central["mse"] ** 0.5 == pytest.approx(17.90, abs=0.05)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    task, settings = loaded(
        write_csv(tmp_path / "a.csv", MIXED), {"target": "label", "model": "mlp"}
    )
    first = task.init(3, settings)
    assert {n: a.tobytes() for n, a in task.init(3, settings).items()} == {
        n: a.tobytes() for n, a in first.items()
    }
    assert task.schema(settings) == first.schema
    one, other = (
        task.train(first, {**settings, "round": 1}, ignore_step).weights for _ in range(2)
    )
    assert all(np.array_equal(one[name], other[name]) for name in first)


def test_predictions_come_row_by_row_in_the_targets_own_words(tmp_path: Path) -> None:
    rows = [{"x": n, "y": "big" if n >= 50 else "small"} for n in range(100)]
    path = write_csv(tmp_path / "a.csv", rows)
    task, settings = loaded(path, {"target": "y", "epochs": 30, "lr": 0.1})
    weights = task.train(task.init(0, settings), {**settings, "round": 1}, ignore_step).weights
    unlabelled = write_csv(tmp_path / "b.csv", [{"x": 90, "z": 1}, {"x": 3, "z": 1}])
    (answers,) = Tabular().predict(weights, settings, str(unlabelled))  # type: ignore[arg-type]
    assert list(answers["row"]) == [0, 1]
    assert answers["y"] == ["big", "small"]
    assert all(0.5 < chance <= 1 for chance in answers["probability"])
    other = write_csv(tmp_path / "c.csv", [{"z": 1}])
    with pytest.raises(UsageError, match="none of the model's features"):
        list(Tabular().predict(weights, settings, str(other)))  # type: ignore[arg-type]


def test_numbers_are_predicted_in_their_own_units(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"x": n, "y": 1000 + 7.5 * n} for n in range(100)])
    task, settings = loaded(path, {"target": "y", "epochs": 60, "lr": 0.05})
    weights = task.train(task.init(0, settings), {**settings, "round": 1}, ignore_step).weights
    (answers,) = task.predict(weights, settings, str(path))  # type: ignore[arg-type]
    assert np.allclose(answers["y"], 1000 + 7.5 * np.arange(100), atol=10)
    told = task.evaluate(weights, settings, ignore_step).metrics  # type: ignore[arg-type]
    assert told["mae"] < 10


# --- a table that is not like the others -----------------------------------------------------


def test_a_table_that_came_later_is_compared(tmp_path: Path) -> None:
    _, settings = loaded(write_csv(tmp_path / "a.csv", MIXED), {"target": "label"})

    def traits(rows: list[dict[str, Any]], **data: Any) -> Any:
        task = Tabular()
        task.load(DataSettings(path=str(write_csv(tmp_path / "b.csv", rows)), **data))
        return task.traits(settings)

    traits([{"age": 3, "label": "no"}] * 20)  # what it lacks is missing
    with pytest.raises(SchemaMismatch, match="column age: expected number, found text"):
        traits([{"age": "old", "label": "no"}] * 20)
    with pytest.raises(SchemaMismatch, match="column label"):
        traits([{"age": 3}] * 20)
    with pytest.raises(DataError, match="fewer than 5 rows have a target"):
        traits([{"age": 3, "label": "perhaps"}] * 20)
    with pytest.raises(SchemaMismatch, match="column age: expected a column that runs may use"):
        traits([{"age": 3, "label": "no"}] * 20, columns=("label",))
    with pytest.raises(DataError, match="fewer than 50"):
        traits([{"age": 3, "label": "no"}] * 20, min_rows=50)


@pytest.mark.attack("10", by="coordinator")
@pytest.mark.parametrize("hidden", ["100000,100000", "9" * 4000, ",".join("1" * 9), "4000," * 8])
def test_layers_that_would_fill_the_memory_are_not_made(tmp_path: Path, hidden: str) -> None:
    """Attack: name layers of a perceptron that have more weights than the machine has memory."""
    task, settings = loaded(write_csv(tmp_path / "a.csv", MIXED), {"target": "label"})
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="hidden"):
            task.schema({**settings, "model": "mlp", "hidden": hidden.strip(",")})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20
    assert task.schema({**settings, "model": "mlp", "hidden": "2000,2000"})


def test_settings_are_checked(tmp_path: Path) -> None:
    task, settings = loaded(write_csv(tmp_path / "a.csv", MIXED), {"target": "label"})
    with pytest.raises(UnknownName, match="model cannot be 'forest'"):
        task.schema({**settings, "model": "forest"})
    with pytest.raises(UsageError, match="hidden"):
        task.schema({**settings, "model": "mlp", "hidden": "64,x"})
    with pytest.raises(UnknownName, match="no setting 'width'"):
        task.survey({"target": "label", "width": 3})
    with pytest.raises(UsageError, match="depth cannot be 11"):
        task.schema({**settings, "model": "trees", "depth": 11})
    with pytest.raises(DataError, match="not surveyed"):
        task.schema({"target": "label"})
