"""A coordinator writes preprocessing that singles out rows: the owner's agent sees none of them.

Each weight of a category changes by the gradients of its rows alone. So a category, a class or a
flag of one row would tell that row's target, or the whole row.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings
from agent.tasks.tabular import Tabular
from agent.tasks.training.secret_noise import SecretNoise
from agent.tasks.work import Describe, Init
from protocols.errors import NotAllowed
from protocols.model import schema_card, weights
from protocols.privacy.private_training import PrivateTraining
from protocols.tables import preprocessing
from protocols.tables.preprocessing import Feature, Preprocessing, Target
from protocols.tables.statistics import Moments, TableStatistics, hash_category
from tests.hostile.test_differences_in_training import SETTINGS, Row, Trainer

pytestmark = pytest.mark.attack("20.3")
MIN_COUNT = DataSettings().min_count
COUNT = 60
NAMES = tuple(f"p{number}" for number in range(COUNT))
WANTED = {**SETTINGS, "target": "ill", "kind": "classification", "features": "age,name"}


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a peer commits which rows each survey told of."""
    return memory_path


def patients() -> list[Row]:
    return [
        {
            "name": NAMES[n],
            "ward": "abc"[n % 3] if n != 40 else "d",
            "age": 20 + n * 7 % 50,
            "ill": "yes" if n * n % 7 in (1, 2) else "no",
            "debt": 900 if n in (3, 41) else 0,
            "visits": "" if n in (7, 8) else 2,
            "score": "" if n in (9, 10) else n * 5 % 17,
            "note": n if n in (11, 12) else "",
        }
        for n in range(COUNT)
    ]


def trained(folder: Path, made: Preprocessing, **more: Any) -> dict[str, Any]:
    """The change of each tensor by one step over all rows, from 0."""
    trainer = Trainer(folder, patients(), WANTED)
    chosen = {**WANTED, "target": made.target.name, "features": "", **more}
    trainer.settings = {**chosen, "preprocessing": preprocessing.encode(made)}
    trainer.do(Init, trainer.settings, seed=0, out=trainer.base)
    trainer.train()
    old, new = weights.load(Path(trainer.base)), weights.load(folder / "out.safetensors")
    return {name: new[name] - old[name] for name in new}


ILL = Target(name="ill", kind="text", classes=("no", "yes"))


@pytest.mark.parametrize("hashed", [False, True])
def test_a_category_for_each_person(tmp_path: Path, hashed: bool) -> None:
    """Attack: name each person as a category; the sign of its weight's change is the label."""
    words = tuple(hash_category("name", name) for name in NAMES) if hashed else NAMES
    made = Preprocessing(
        features=(Feature(name="name", kind="text", categories=words),), target=ILL, hashed=hashed
    )
    change = trained(tmp_path, made)["embedding0.weight"]
    told = np.flatnonzero(change.any(axis=1))
    assert len(told) <= 1, f"the labels of {len(told)} persons follow from their own weights"


def test_a_class_for_each_person(tmp_path: Path) -> None:
    """Attack: name each person as a class; the change of its weights is the person's row, less
    what all rows add."""
    made = Preprocessing(
        features=(Feature(name="age", kind="number", mean=40.0, scale=10.0),),
        target=Target(name="name", kind="text", classes=NAMES[:40]),
    )
    with pytest.raises(NotAllowed, match="data_min_count"):
        trained(tmp_path, made)


def test_a_rare_class_tells_its_row(tmp_path: Path) -> None:
    """Attack: an honest run for a class of which this machine has one row: ward d."""
    made = Preprocessing(
        features=(Feature(name="age", kind="number"),),
        target=Target(name="ward", kind="text", classes=("a", "b", "c", "d")),
    )
    change = trained(tmp_path, made)
    # Without a row of the class, its weights change by the mean over all rows, as any class's do.
    ages = np.array([row["age"] for row in patients() if row["ward"] != "d"])
    step = -change["output.weight"][3, 0] / (SETTINGS["lr"] * 0.25)
    assert ages.mean() - 3 < step < ages.mean() + 3


TEXT = "text"
CRAFTED = {
    "all but one": (Feature(name="name", kind=TEXT, categories=NAMES[:40] + NAMES[41:]),),
    "a rare one": (Feature(name="ward", kind=TEXT, categories=("a", "b", "c", "d")),),
    "all but the rare one": (Feature(name="ward", kind=TEXT, categories=("a", "b", "c")),),
    "a number as text": (Feature(name="age", kind=TEXT, categories=("20", "27", "34")),),
    "rare numbers": (Feature(name="debt", kind="number"),),
    "few missing numbers": (Feature(name="score", kind="number", missing=True),),
    "few missing, others alike": (Feature(name="visits", kind="number"),),
    "few missing, others alike, and told": (Feature(name="visits", kind="number", missing=True),),
    "few there": (Feature(name="note", kind="number", missing=True),),
    "few there, not told": (Feature(name="note", kind="number"),),
    "few missing texts": (Feature(name="score", kind=TEXT, categories=("5", "10")),),
    "few texts there": (Feature(name="note", kind=TEXT, categories=("11", "12")),),
}


@pytest.mark.parametrize("features", CRAFTED.values(), ids=CRAFTED.keys())
def test_no_input_of_a_model_belongs_to_a_few(
    tmp_path: Path, features: tuple[Feature, ...]
) -> None:
    """Attack: preprocessing in which an input has one value for a few rows and another for all
    others: a rare category, an unseen one, a missing value, a number that is 0 elsewhere."""
    made = Preprocessing(features=features, target=ILL)
    for part in parts_of(tmp_path, made):
        for column in part.T:
            _, counts = np.unique(column, return_counts=True)
            if features[0].kind == TEXT or len(counts) < 4:
                assert counts.min() >= MIN_COUNT, f"a value of {counts.min()} rows"


def parts_of(folder: Path, made: Preprocessing) -> list[Any]:
    """The inputs of the rows to train on and of those held out."""
    trainer = Trainer(folder, patients(), WANTED)
    task = Tabular()
    task.load(
        DataSettings(
            path=str(trainer.file),
            min_rows=20,
            cache=str(folder),
            memory=str(folder / "told" / "told.db"),
            device="cpu",
        )
    )
    rows = task._sets({**WANTED, "preprocessing": preprocessing.encode(made)})
    return [part.x for part in rows]


def test_two_lists_of_categories_do_not_differ_in_a_few_rows(tmp_path: Path) -> None:
    """Attack: leave out of the categories a common one and a rare one, and then only the rare one;
    the weights of the unseen differ by the rare row."""
    sets = []
    for number, categories in enumerate((("a", "b"), ("a", "b", "c"), ("a", "b", "c", "d"))):
        feature = Feature(name="ward", kind=TEXT, categories=categories)
        made = Preprocessing(features=(feature,), target=ILL)
        (tmp_path / str(number)).mkdir()
        x = parts_of(tmp_path / str(number), made)[0][:, 0]
        sets += [x == value for value in np.unique(x)]
    differences = [int((one ^ other).sum()) for one in sets for other in sets]
    assert all(count == 0 or count >= MIN_COUNT for count in differences)


def test_the_survey_counts_and_sums_no_few_rows(tmp_path: Path) -> None:
    """Attack: read from the survey of a table the sum of a column that is 0 but for one person,
    how many values are missing or rare, or the mean of a column that two rows have."""
    found = Trainer(tmp_path, patients(), WANTED).do(Describe, {**WANTED, "features": ""})
    table = schema_card.decode(found.description)
    assert isinstance(table, TableStatistics)
    for name, column in table.columns.items():
        for count in (column.missing, column.others, *column.categories.values()):
            assert count == 0 or count >= MIN_COUNT, f"{count} rows of {name}"
        assert column.moments.count == 0 or column.moments.count >= MIN_COUNT
    debt, note = table.columns["debt"].moments, table.columns["note"].moments
    assert (debt.mean, debt.m2) == (0.0, 0.0), "the debts of two"
    assert note == Moments()


def test_the_sum_of_a_sparse_target(tmp_path: Path) -> None:
    """Attack: predict a number that is 0 but for two persons: the change of the bias is their
    sum."""
    made = Preprocessing(
        features=(Feature(name="age", kind="number", mean=45.0, scale=15.0),),
        target=Target(name="debt", kind="number"),
    )
    change = trained(tmp_path, made, kind="regression")
    assert not any(values.any() for values in change.values())


# --- with noise --------------------------------------------------------------------------------

PRIVATE = PrivateTraining(3.0, 1e-5, clip=1.0, rounds=1)
#: What more and more rows have, and the preprocessing of a coordinator that knows it.
SHARED: dict[str, tuple[Row, Preprocessing]] = {
    "a category": (
        {"ward": "d", "ill": "yes"},
        Preprocessing(
            features=(Feature(name="ward", kind=TEXT, categories=("a", "b", "c", "d")),), target=ILL
        ),
    ),
    "a class": (
        {"ward": "d"},
        Preprocessing(
            features=(Feature(name="age", kind="number", mean=40.0, scale=10.0),),
            target=Target(name="ward", kind="text", classes=("a", "b", "c", "d")),
        ),
    ),
    "a number": (
        {"debt": 900},
        Preprocessing(features=(Feature(name="debt", kind="number", scale=100.0),), target=ILL),
    ),
    "a missing number": (
        {"age": ""},
        Preprocessing(features=(Feature(name="age", kind="number", missing=True),), target=ILL),
    ),
}


def reach_of_a_row(folder: Path, kind: str) -> float:
    """The most that one row changes the sum of gradients, in clips, as more rows become alike.

    Without the noise, so that it is seen.
    """
    alike, made = SHARED[kind]
    plain = [{**row, "debt": 0, "ward": "abc"[n % 3]} for n, row in enumerate(patients())]
    sums = []
    for count in range(MIN_COUNT - 2, MIN_COUNT + 4):  # some of them are held out
        rows = [{**row, **alike} if n < count else row for n, row in enumerate(plain)]
        (part := folder / str(count)).mkdir(parents=True)
        trainer = Trainer(part, rows, WANTED)
        chosen = {**WANTED, "target": made.target.name, "features": "", "lr": 1.0}
        trainer.settings = {**chosen, "preprocessing": preprocessing.encode(made)}
        trainer.do(Init, trainer.settings, seed=0, out=trainer.base)
        examples, change = trainer.train(**PRIVATE.settings())
        sums.append(examples * change)
    return max(float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(sums))


@pytest.mark.parametrize("kind", SHARED)
def test_with_a_budget_a_row_changes_its_own_gradient_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: find a row in a run with noise by the rows that have a rare value with it: without
    it, they would count as others.

    Its own gradient has at most the norm of the clip, before and after its value was changed.
    """
    monkeypatch.setattr(SecretNoise, "normals", lambda self, count: np.zeros(count))
    monkeypatch.setattr(Trainer, "has_budget", True)
    assert 0.5 < reach_of_a_row(tmp_path, kind) < 2.001


def test_without_a_budget_a_row_changes_how_others_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: without a budget, rare values are replaced, and the noise does not cover that."""
    monkeypatch.setattr(SecretNoise, "normals", lambda self, count: np.zeros(count))
    assert reach_of_a_row(tmp_path, "a category") > 3
