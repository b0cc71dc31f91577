"""The comparison of models inside one peer (`model=auto`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings
from agent.tasks import tabular_choice
from agent.tasks.tabular import Tabular
from agent.tasks.work import Describe
from agent.trainer.executor import WorkExecutor
from agent.trainer.progress import WorkControl
from protocols.errors import UsageError
from protocols.model import schema_card
from protocols.tables import preprocessing
from protocols.tables.model_scores import ModelScores
from tests.support.callbacks import ignore_step
from tests.support.tables import write_csv


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the trainer: several threads wait for each other on a loaded machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: Small ones, so that a comparison takes a second.
SMALL = {"model": "auto", "trees": 8, "depth": 2, "bins": 8, "hidden": "8"}


def table(folder: Path, rows: int) -> Path:
    """A class that is on both sides of a strip, and a number that is a line."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, rows)).round(3)
    made = [
        {"a": x, "b": y, "ill": "ny"[int(abs(x) > 0.5)], "cost": round(3 * x - y, 3)}
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    return write_csv(folder / "table.csv", made)


def settings_of(data: DataSettings, target: str, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"target": target, "features": "a,b", **SMALL, **more}
    task = Tabular()
    task.load(data)
    made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
    return {**settings, "preprocessing": preprocessing.encode(made)}


def compared(data: DataSettings, settings: dict[str, Any]) -> tuple[ModelScores, list[int]]:
    """The scores, and the places of the rows that they depend on."""
    task, places = Tabular(), list[int]()
    task.load(data)
    told = task.score_models(settings, lambda some: places.extend(some.tolist()), ignore_step)
    assert told is not None
    return told, places


def test_the_model_that_fits_the_table_has_the_best_score(tmp_path: Path) -> None:
    data = DataSettings(path=str(table(tmp_path, 300)), device="cpu")
    told, places = compared(data, settings_of(data, "ill"))
    # A fifth of the rows is held out, and no score depends on it.
    assert (told.rows, places) == (240, list(range(240)))
    accuracy = {model: metrics["accuracy"] for model, metrics in told.metrics.items()}
    assert accuracy.keys() == {"linear", "mlp", "trees"}
    assert (accuracy["trees"] or 0) > 0.85 > 0.7 > (accuracy["linear"] or 1)
    assert told.metrics["linear"].keys() >= {"loss", "balanced_accuracy", "macro_f1", "ece"}
    told, _ = compared(data, settings_of(data, "cost"))
    errors = {model: metrics["rmse"] for model, metrics in told.metrics.items()}
    assert min(errors, key=lambda model: errors[model] or 9) == "linear"


def test_the_same_rows_give_the_same_scores(tmp_path: Path) -> None:
    data = DataSettings(path=str(table(tmp_path, 120)), device="cpu")
    settings = settings_of(data, "ill")
    assert compared(data, settings) == compared(data, settings)


def test_few_rows_give_no_score_and_many_rows_a_sample(tmp_path: Path) -> None:
    data = DataSettings(path=str(table(tmp_path, 30)), device="cpu")
    assert compared(data, settings_of(data, "cost")) == (ModelScores(), [])
    least = DataSettings(path=str(table(tmp_path, 120)), device="cpu", min_count=40)
    assert compared(least, settings_of(least, "cost"))[0] == ModelScores()
    for rows, inputs, count in ((9_000, 3, 9_000), (50_000, 3, 10_000), (50_000, 100, 5_000)):
        places = tabular_choice.choose_rows(rows, inputs, seed=0)
        assert len(places) == len(set(places.tolist())) == count
        assert places.max() < rows


def test_a_model_that_cannot_be_trained_is_no_candidate(tmp_path: Path) -> None:
    data = DataSettings(path=str(table(tmp_path, 120)), device="cpu")
    told, _ = compared(data, settings_of(data, "cost", hidden="many"))
    assert told.metrics.keys() == {"linear", "trees"}


def test_no_run_trains_before_it_has_chosen(tmp_path: Path) -> None:
    data = DataSettings(path=str(table(tmp_path, 120)), device="cpu")
    settings = settings_of(data, "ill")
    task = Tabular()
    task.load(data)
    for use in (task.schema, lambda some: task.init(0, some)):
        with pytest.raises(UsageError, match="not chosen"):
            use(settings)
    assert task.score_models({**settings, "model": "linear"}, lambda _: None, ignore_step) is None


def test_a_trainer_answers_with_scores_alone(tmp_path: Path) -> None:
    data = DataSettings(path=str(table(tmp_path, 120)), device="cpu")
    executor = WorkExecutor(WorkControl(), lambda answer: None, threads=1)
    done = executor.do(Describe(task="tabular", settings=settings_of(data, "ill"), data=data))
    told = schema_card.decode(done.description)  # type: ignore[union-attr]
    assert isinstance(told, ModelScores)
    assert told.rows == 96


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80))
def test_folds_in_time_are_trained_on_earlier_rows(days: list[int]) -> None:
    times, measured = np.array(days, float), np.zeros(len(days), int)
    for on, out in tabular_choice.time_folds(times):
        assert times[on].max(initial=-1) < times[out].min(initial=99)
        measured += out
    assert measured.max() <= 1, "no row counts twice"
    if len(set(days)) == len(days) > 20:
        assert len(days) / 2 < measured.sum() < len(days)


def test_with_split_by_models_are_judged_on_later_rows(tmp_path: Path) -> None:
    """A line extends beyond the rows that it was trained on, and trees do not."""
    rng = np.random.default_rng(3)
    days = rng.permutation(400)
    rows = [{"a": int(day), "cost": round(float(day + rng.normal()), 2)} for day in days]
    data = DataSettings(path=str(write_csv(tmp_path / "table.csv", rows)), device="cpu")
    by_time = settings_of(data, "cost", features="a", split_by="a", bins=32, depth=4, trees=40)
    told, _ = compared(data, by_time)
    assert told.rows == 240, "the first quarter of the 320 earliest rows is trained on alone"
    assert (told.metrics["trees"]["rmse"] or 0) > 30 > 3 * (told.metrics["linear"]["rmse"] or 99)
    at_random = {name: value for name, value in by_time.items() if name != "split_by"}
    told, _ = compared(data, at_random)
    assert told.rows == 320
    assert (told.metrics["trees"]["rmse"] or 99) < 20
    few = [{"a": n % 2, "cost": n} for n in range(100)]
    data = DataSettings(path=str(write_csv(tmp_path / "few.csv", few)), device="cpu")
    told, _ = compared(data, settings_of(data, "cost", features="a", split_by="a"))
    assert told == ModelScores(), "all rows to train on are of one day"
