"""Files of any size and order come to the same statistics; what is wrong with one is told."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from agent.data import arrow_reader, column_types, features, open_table, profile
from agent.data.profile import KindAggregation
from agent.data.settings import DataSettings
from protocols.errors import CommonweightError, DataError, SchemaMismatch
from protocols.model import schema_card
from protocols.tables import preprocessing
from protocols.tables.preprocessing import parse_settings
from protocols.tables.statistics import ColumnKind, TableStatistics
from tests.support.tables import MIXED, write_csv, write_parquet


def surveyed(path: Path, *, target: str = "label", **changed: Any) -> TableStatistics:
    settings = {"target": target, **changed.pop("settings", {})}
    data = DataSettings(path=str(path), **({"min_count": 1} | changed))
    return profile.survey(open_table(data), data, parse_settings(settings))


def test_every_kind_of_column_is_found_and_measured(tmp_path: Path) -> None:
    found = surveyed(write_csv(tmp_path / "a.csv", MIXED))
    assert found.rows == 200
    kinds = {name: column.kind for name, column in found.columns.items()}
    assert kinds == {
        "age": "number", "income": "number", "member": "boolean", "since": "date",
        "city": "text", "note": "text", "empty": "empty", "label": "text",
    }  # fmt: skip
    ages = np.array([float(row["age"]) for row in MIXED if row["age"]])
    age = found.columns["age"]
    assert (age.missing, age.moments.count, age.whole) == (200 - len(ages), len(ages), True)
    assert age.moments.mean == pytest.approx(ages.mean(), rel=1e-12)
    assert age.moments.variance == pytest.approx(ages.var(), rel=1e-12)
    assert age.extremes is None, "only on wish"
    assert age.categories == {}, "the values of a number are nobody's affair"
    assert found.columns["city"].missing == 40
    assert set(found.columns["city"].categories) == {"Bern", "Zürich", "Basel", 'a "b", c'}
    days = np.array([date.fromisoformat(row["since"]).toordinal() - 719163 for row in MIXED])
    assert found.columns["since"].moments.mean == pytest.approx(days.mean(), rel=1e-12)


def test_what_categories_hold_can_be_told(tmp_path: Path) -> None:
    """Line ends, marks that turn the writing round, and texts without end, in a quoted value."""
    odd = ["two\nlines", "tab\there", "turned\u202eround", "long " * 100]
    rows = [{"city": odd[n % 4], "label": "yes" if n % 3 else "no"} for n in range(40)]
    found = surveyed(write_csv(tmp_path / "a.csv", rows))
    assert schema_card.decode(schema_card.encode(found)) == found
    assert set(found.columns["city"].categories) == {
        "two lines", "tab here", "turned round", ("long " * 100)[:400],
    }  # fmt: skip


@pytest.mark.parametrize("form", ["semicolons", "tabs", "folder", "pattern", "parquet", "order"])
def test_the_same_rows_in_any_form_give_the_same_statistics(tmp_path: Path, form: str) -> None:
    expected = surveyed(write_csv(tmp_path / "a.csv", MIXED))
    folder = tmp_path / "other"
    folder.mkdir()
    path = folder / "t.csv"
    if form in ("semicolons", "tabs"):
        write_csv(path, MIXED, separator=";" if form == "semicolons" else "\t")
    elif form == "parquet":
        path = write_parquet(folder / "t.parquet", MIXED)
    elif form == "order":
        write_csv(path, MIXED[::-1], sorted(MIXED[0]))
    else:
        write_csv(folder / "t1.csv", MIXED[:50])
        write_csv(folder / "t2.csv", MIXED[50:], sorted(MIXED[0]))
        path = folder if form == "folder" else folder / "t*.csv"
    found = surveyed(path)
    assert found.columns.keys() == expected.columns.keys()
    for name, column in found.columns.items():
        assert _rounded(column) == _rounded(expected.columns[name])


def _rounded(column: Any) -> Any:
    moments = [float(f"{value:.11g}") for value in msgspec.to_builtins(column.moments)]
    return msgspec.structs.replace(column, moments=None), moments


def test_small_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path / "a.csv", MIXED)
    expected = surveyed(path)
    monkeypatch.setattr(arrow_reader, "_BLOCK_BYTES", 1024)
    assert len(list(arrow_reader.ArrowReader(str(path)).batches(["age"]))) > 10
    found = surveyed(path)
    for name, column in found.columns.items():
        assert _rounded(column) == _rounded(expected.columns[name])


def test_a_type_that_only_the_last_rows_have_is_found(tmp_path: Path) -> None:
    rows = [{"x": str(n), "y": "a"} for n in range(5000)] + [{"x": "12 kg", "y": "b"}]
    assert surveyed(write_csv(tmp_path / "a.csv", rows), target="y").columns["x"].kind == "text"


@pytest.mark.parametrize(
    ("values", "written"),
    [
        (["147,5", "1.234,0", "12", "-3,25"], "comma"),
        (["1 234,5", "2 000", "7"], "comma"),
        (["31.03.2024", "1.4.24"], "local date"),
        (["3/31/2024 14:05", "4/1/2024 09:00:01"], "local date"),
        (["31.03.2024", "soon"], ""),
        (["Bern, old town", "Basel"], ""),
        (["147.5", "12"], ""),
        (["2024-03-31", "2024-04-01"], ""),
    ],
)
def test_numbers_and_dates_in_another_format_are_recognized(
    tmp_path: Path, values: list[str], written: str
) -> None:
    rows = [{"x": values[n % len(values)], "y": n % 2} for n in range(40)]
    found = surveyed(write_csv(tmp_path / "a.csv", rows, separator=";"), target="y")
    assert found.columns["x"].written == written
    assert schema_card.decode(schema_card.encode(found)) == found


def test_the_owner_reads_all_columns_that_do_not_fit_at_once(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", MIXED)
    with pytest.raises(SchemaMismatch) as caught:
        surveyed(path, target="labl", settings={"features": "age,City,weight"})
    assert caught.value.message == (
        "column labl: expected a column of this name, found a similar one: label; "
        "column City: expected a column of this name, found a similar one: city; "
        "column weight: expected a column of this name, found no such column"
    )
    good = surveyed(path)
    settings = {"target": "label"}
    made = preprocessing.derive({"a": good}, settings).preprocessing
    odd = [{"age": f"{n},5", "since": f"{n % 28 + 1}.3.2024", "label": "yes"} for n in range(40)]
    data = DataSettings(path=str(write_csv(tmp_path / "b.csv", odd, separator=";")))
    with pytest.raises(SchemaMismatch, match=r"column age: .* like 1\.234,5") as caught:
        profile.check_table(open_table(data), data, made, parse_settings(settings))
    assert (
        "column since: expected date, found text like 31.3.2024 (write 2024-03-31)"
        in caught.value.message
    )
    none = DataSettings(path=str(write_csv(tmp_path / "c.csv", [{"Ages": 1, "label": "no"}] * 40)))
    with pytest.raises(SchemaMismatch, match=r"features: expected some of .*similar: Ages"):
        profile.check_table(open_table(none), none, made, parse_settings(settings))


def test_a_model_that_reads_dates_names_the_column_with_other_ones(tmp_path: Path) -> None:
    rows = [{"since": f"2024-03-{n % 28 + 1:02}", "n": n, "y": n % 2} for n in range(40)]
    told = surveyed(write_csv(tmp_path / "a.csv", rows), target="y")
    made = preprocessing.derive({"a": told}, {"target": "y"}).preprocessing
    odd = [{"since": "31.03.2024", "n": "1,5"}]
    (batch,) = open_table(
        DataSettings(path=str(write_csv(tmp_path / "b.csv", odd, separator=";")))
    ).batches(["since", "n"])
    for names, found in (
        (["since"], "column since: expected date, found text like 31.3.2024 (write 2024-03-31)"),
        (["n"], "column n: expected number, found text like 1.234,5 (write 1234.5)"),
    ):
        with pytest.raises(SchemaMismatch) as caught:
            features.encode_inputs(batch.select(names), made)
        assert caught.value.message == found


# --- what its owner lets out -----------------------------------------------------------------


def test_only_allowed_columns_and_common_values_are_told(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", MIXED)
    found = surveyed(path, columns=("age", "c*", "label"), min_count=5)
    assert list(found.columns) == ["age", "city", "label"]
    with pytest.raises(SchemaMismatch, match="its owner keeps back"):
        surveyed(path, columns=("age",))
    rare = [{"x": "secret" if n == 3 else "common", "y": n % 2} for n in range(50)]
    told = surveyed(write_csv(tmp_path / "b.csv", rare), target="y", min_count=5)
    assert told.columns["x"].categories == {"common": 50}, "nor how many rows have rare ones"
    assert told.columns["x"].others == 0


def test_too_few_rows_and_unwanted_extremes_are_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", MIXED)
    with pytest.raises(DataError, match="at least 500 rows") as caught:
        surveyed(path, min_rows=500)
    assert "200" not in caught.value.message, "how many there are is for the owner alone"
    with pytest.raises(DataError, match="minmax"):
        surveyed(path, settings={"scaling": "minmax"})
    told = surveyed(path, settings={"scaling": "minmax"}, extremes=True)
    assert told.columns["age"].extremes == (20, 69)


def test_hashed_categories_hide_all_but_the_target(tmp_path: Path) -> None:
    told = surveyed(write_csv(tmp_path / "a.csv", MIXED), settings={"hashed": "true"})
    assert all(name.startswith("#") for name in told.columns["city"].categories)
    assert set(told.columns["label"].categories) == {"no", "yes"}


# --- bad input -------------------------------------------------------------------------------


def test_what_is_wrong_with_a_file_is_told_without_its_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("x,y\nZürich,1\n".encode("latin-1") * 20)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("x,y\n1,2\n1,2,3\n")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    twice = tmp_path / "twice.csv"
    twice.write_text("x,x,y\n1,2,3\n")
    header = tmp_path / "header.csv"
    header.write_text("x,y\n")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really PAR1")
    for path, words in {
        latin: "no UTF-8 text",
        ragged: "cannot be read as a table",
        empty: "no header",
        twice: "two columns of a table have the same name",
        header: "no rows",
        broken: "cannot be read as a table",
        tmp_path / "absent.csv": "no CSV or Parquet file was found at the given path",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            surveyed(path, target="y")
        assert path.name not in caught.value.message
    with pytest.raises(SchemaMismatch, match="column price: expected a column of this name"):
        surveyed(write_csv(tmp_path / "a.csv", MIXED), target="price")
    with pytest.raises(SchemaMismatch, match=r"found a similar one: city"):
        surveyed(write_csv(tmp_path / "a.csv", MIXED), target="City ")
    with pytest.raises(DataError, match="no data"):
        open_table(DataSettings())
    with pytest.raises(CommonweightError, match="no such reader of tables"):
        open_table(DataSettings(path=str(latin), reader="excel"))


@pytest.mark.parametrize(
    ("column", "kind", "found"),
    [
        (pa.array([1, None, 3]), "number", [1, np.nan, 3]),
        (pa.array([1.5, float("inf"), float("nan")]), "number", [1.5, np.nan, np.nan]),
        (pa.array([True, None, False]), "boolean", [1, np.nan, 0]),
        (pa.array([date(1970, 1, 3), None]), "date", [2, np.nan]),
        (pa.array([datetime(1970, 1, 1, 12)]), "date", [0.5]),
        (pa.array([" 1e3 ", "?", "-2"]), "number", [1000, np.nan, -2]),
        (pa.array(["1970-01-02T12:00:00Z"]), "date", [1.5]),
        (pa.array(["TRUE", "-", "false"]), "boolean", [1, np.nan, 0]),
        (pa.array(["3", "3"]).dictionary_encode(), "number", [3, 3]),
    ],
)
def test_what_values_mean(column: pa.Array, kind: ColumnKind, found: list[float]) -> None:
    assert column_types.possible_kinds(column).kind == kind
    assert np.array_equal(column_types.numbers(column, kind), found, equal_nan=True)


def test_texts_of_any_type() -> None:
    assert column_types.texts(pa.array([1.0, 2.5, None])).to_pylist() == ["1", "2.5", None]
    assert column_types.texts(pa.array([True, None])).to_pylist() == ["1", None]
    assert column_types.texts(pa.array([" a ", "NULL"])).to_pylist() == ["a", None]


def test_kinds_of_parts_merge(tmp_path: Path) -> None:
    reader = arrow_reader.ArrowReader(str(write_csv(tmp_path / "a.csv", MIXED)))
    batches = list(reader.batches(["age", "city"]))
    fold = KindAggregation()
    found = fold.merge(
        fold.from_batch(batches[0].slice(0, 1)), fold.from_batch(batches[0].slice(1))
    )
    assert found == fold.from_batch(batches[0])
    assert preprocessing.parse_settings({"target": "x"}).kind == "auto"
