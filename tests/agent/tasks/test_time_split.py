"""The latest rows are held out: --set split_by=COLUMN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.clientapp import consent
from agent.data import features, latest_rows
from agent.data.settings import DataSettings
from agent.home.settings import AgentSettings
from agent.policy.consent import Consent
from agent.tasks.tabular import Tabular
from protocols.errors import CommonweightError, DataError, NotAllowed, UsageError
from protocols.tables import preprocessing
from tests.support.tables import Rows, write_csv, write_parquet

SETTINGS: dict[str, Any] = {"target": "ill", "split_by": "visit"}


def visits(count: int = 100, first: int = 0) -> Rows:
    """One visit a day in a mixed order; `place` says which. The last two have no date."""
    order = np.random.default_rng(0).permutation(count)
    days = np.datetime64("2024-01-01") + first + order
    return [
        {
            "visit": str(day) if place < count - 2 else "",
            "place": str(first + number),
            "ill": "ny"[number % 2],
            "age": str(20 + number % 50),
        }
        for place, (day, number) in enumerate(zip(days, order, strict=True))
    ]


def loaded(path: Path, settings: dict[str, Any], **data: Any) -> tuple[Tabular, dict[str, Any]]:
    task = Tabular()
    task.load(DataSettings(path=str(path), device="cpu", **({"min_count": 1} | data)))
    made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
    return task, {**settings, "preprocessing": preprocessing.encode(made)}


def numbers_of(found: tuple[Tabular, dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The column `place` of the rows to train on, and of those held out, sorted."""
    task, settings = found
    made = preprocessing.decode(settings["preprocessing"])
    place = [feature.name for feature in made.numeric].index("place")
    feature = made.numeric[place]
    return tuple(  # type: ignore[return-value]
        sorted(np.rint(rows.x[:, place] * feature.scale + feature.mean).astype(int).tolist())
        for rows in task._sets(settings)
    )


@pytest.mark.parametrize("model", ["linear", "trees"])
@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_the_latest_fifth_is_held_out_in_any_order(
    tmp_path: Path, write: Callable[[Path, Rows], Path], model: str
) -> None:
    rows = visits()
    gone = {int(row["place"]) for row in rows if not row["visit"]}
    path = write(tmp_path / ("a.csv" if write is write_csv else "a.parquet"), rows)
    train, held = numbers_of(loaded(path, SETTINGS | {"model": model}))
    dated = [number for number in range(100) if number not in gone]
    assert held == dated[-20:]
    assert train == dated[:-20]


def test_rows_of_one_day_are_on_one_side(tmp_path: Path) -> None:
    rows = [row | {"visit": f"2024-{1 + int(row['place']) // 30:02}-01"} for row in visits()]
    train, held = numbers_of(loaded(write_csv(tmp_path / "a.csv", rows), SETTINGS))
    assert (train, held) == (list(range(90)), list(range(90, 100)))


def test_the_column_is_a_feature_only_if_the_run_names_it(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", visits())
    for features_, expected in (("", ["age", "place"]), ("visit,age", ["age", "visit"])):
        _, settings = loaded(path, SETTINGS | {"features": features_})
        made = preprocessing.decode(settings["preprocessing"])
        assert [feature.name for feature in made.features] == expected
    task = Tabular()
    task.load(DataSettings(path=str(path), min_count=1))
    assert task.survey(SETTINGS).columns.keys() == {"age", "place", "ill"}, "nothing of it leaves"


def test_rows_beyond_memory_are_split_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "a.csv", visits())
    expected = numbers_of(loaded(path, SETTINGS))
    monkeypatch.setattr(features, "IN_MEMORY_BYTES", 100)
    found = loaded(path, SETTINGS, cache=str(tmp_path))
    assert isinstance(found[0]._sets(found[1])[0].x, np.memmap)
    assert numbers_of(found) == expected


def test_a_row_stays_on_its_side_and_later_ones_are_split_as_a_group(tmp_path: Path) -> None:
    memory = {"memory": str(tmp_path / "rows.db"), "min_count": 5}
    path = write_csv(tmp_path / "a.csv", visits())
    train, held = numbers_of(loaded(path, SETTINGS, **memory))
    write_csv(path, visits()[::-1])
    assert numbers_of(loaded(path, SETTINGS, **memory)) == (train, held)
    random = {name: value for name, value in SETTINGS.items() if name != "split_by"}
    assert numbers_of(loaded(path, random, **memory))[1] != held
    write_csv(path, [*visits(), *visits(50, first=200)])
    later = numbers_of(loaded(path, SETTINGS, **memory))
    assert [set(old) <= set(new) for old, new in zip((train, held), later, strict=True)] == [
        True,
        True,
    ]
    added = [sorted(set(new) - set(old)) for old, new in zip((train, held), later, strict=True)]
    assert max(added[0]) < min(added[1])
    assert len(added[1]) == 10
    write_csv(path, [*visits(), *visits(50, first=200), *visits(7, first=300)])
    more = numbers_of(loaded(path, SETTINGS, **memory))
    assert more[1] == later[1], "a few held-out rows alone would be told by their loss"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["2024-01-01"] * 100, "no rows are later than most others by the column visit"),
        (["2024-01-01"] * 40 + ["2024-01-02"] * 60, "no rows are later than most others"),
        ([""] * 100, "column visit: expected dates or numbers, by which rows are held out, found"),
        ([f"{1 + n % 28}.3.2024" for n in range(100)], "like 31.3.2024 (write 2024-03-31)"),
        (["spring", "fall"] * 50, "found text"),
        (None, "column visit"),
    ],
)
def test_a_column_that_cannot_say_what_is_late_is_refused(
    tmp_path: Path, values: list[str] | None, words: str
) -> None:
    rows = [
        {"ill": "ny"[n % 2], "age": str(n), **({"visit": values[n]} if values else {})}
        for n in range(100)
    ]
    path = write_csv(tmp_path / "a.csv", rows)

    def described() -> None:
        task, settings = loaded(path, SETTINGS)
        task.traits(settings)

    with pytest.raises(CommonweightError) as found:
        described()
    assert words in found.value.message + found.value.hint


def test_the_target_cannot_say_what_is_late() -> None:
    with pytest.raises(UsageError, match="ill is the target"):
        preprocessing.parse_settings({"target": "ill", "split_by": "ill"})
    with pytest.raises(DataError):
        latest_rows.latest(np.zeros(0), "visit")


@pytest.mark.attack("3")
def test_rows_are_not_split_by_a_column_beyond_the_consent(tmp_path: Path) -> None:
    """Attack: learn who is in the latest rows by a column that the owner keeps back."""
    chosen = AgentSettings(
        tasks=("tabular",), consents={"tabular": Consent(columns=("age", "ill"))}
    )
    with pytest.raises(NotAllowed, match="'visit'"):
        consent.check(chosen, "run", "tabular", SETTINGS)
    path = write_csv(tmp_path / "a.csv", visits())
    plain = {"target": "ill", "features": "age"}
    task, settings = loaded(path, plain, columns=("age", "ill"))
    with pytest.raises(CommonweightError, match="a column that runs may use"):
        task._sets(settings | {"split_by": "visit"})
