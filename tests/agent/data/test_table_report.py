"""What `data check` says of messy tables."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from agent.data import open_table, table_report
from agent.data.settings import DataSettings
from agent.data.table_report import ColumnReport, TableReport
from protocols.errors import DataError
from tests.support.tables import write_csv


def report_of(
    tmp_path: Path, table: dict[str, list[str]], target: str = "", **limits: object
) -> TableReport:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    path = write_csv(tmp_path / "table.csv", rows)
    data = DataSettings(path=str(path), **limits)  # type: ignore[arg-type]
    return table_report.report(open_table(data), data, target)


def column(tmp_path: Path, values: list[str], name: str = "x", target: str = "") -> ColumnReport:
    return report_of(tmp_path, {name: values}, target).columns[0]


@pytest.mark.parametrize(
    ("name", "values", "note"),
    [
        ("patient_id", [str(1000 + i) for i in range(40)], "as in an identifier"),
        ("caseId", [str(i * 7) for i in range(40)], "as in an identifier"),
        ("name", [f"P{i}" for i in range(40)], "as in an identifier"),
        ("note", [f"text {i % 1500}" for i in range(1600)], "too many values for categories"),
        ("ward", ["A"] * 40, "one value only"),
        ("sex", ["f", "F", "m", "m "] * 10, "spelled in several ways: F, f"),
        ("answer", ["Not known", "not_known"] * 20, "several ways: Not known, not_known"),
        ("dose", ["1,5", "2,25"] * 20, "data format dose 1.234,5"),
        ("seen", ["31.3.2024", "1.4.2024"] * 20, "data format seen 31.12.2024"),
        ("lactate", ["1.5", "", "", "2"] * 10 + [""], "51% are missing"),
    ],
)
def test_what_is_odd_about_a_column(
    tmp_path: Path, name: str, values: list[str], note: str
) -> None:
    assert any(note in text for text in column(tmp_path, values, name).notes)


@pytest.mark.parametrize(
    "values",
    [
        [str(i) for i in range(40)],  # a number of its own in each row may be a measurement
        ["1.5", "2.5"] * 20,
        ["yes", "no"] * 20,
        ["2024-03-31", "2024-04-01"] * 20,
        [""] * 40,
    ],
)
def test_nothing_is_odd_about_an_ordinary_column(tmp_path: Path, values: list[str]) -> None:
    assert column(tmp_path, values).notes == ()


def test_what_a_run_would_be_told_has_no_rare_value(tmp_path: Path) -> None:
    values = ["flu"] * 20 + ["cold"] * 12 + ["rabies"] * 2
    assert column(tmp_path, values) == ColumnReport("x", "text", 0, "flu 22, cold 12", 1)
    numbers = column(tmp_path, ["1", "3"] * 20)
    assert (numbers.kind, numbers.told) == ("number", "mean 2, sd 1 of 40")


def test_columns_and_rows_that_the_owner_keeps_back_are_not_told(tmp_path: Path) -> None:
    table = {"age": ["1", "2"] * 20, "name": ["a", "b"] * 20}
    found = report_of(tmp_path, table, columns=("age",))
    assert [one.told for one in found.columns] == ["mean 1.5, sd 0.5 of 40", "nothing"]
    assert found.notes == ("not among data.columns: name",)
    few = report_of(tmp_path, table, min_rows=100)
    assert {one.told for one in few.columns} == {"nothing"}
    assert few.notes == ("fewer rows than data.min_rows (100): no run gets anything",)


def test_the_classes_of_the_target(tmp_path: Path) -> None:
    values = ["ok"] * 96 + ["ill"] * 5 + ["dead"] * 2 + [""] * 7
    notes = column(tmp_path, values, target="x").notes
    assert "7 rows have no target: not used" in notes
    assert "classes of fewer than 5 rows are left out: dead" in notes
    few = column(tmp_path, ["0"] * 196 + ["1"] * 5, target="x").notes
    assert few == (
        "the class '1' has 2.5% of the rows; "
        "the operator can start the run with --set class_weights=balanced",
    )
    with pytest.raises(DataError, match="no column 'y'"):
        column(tmp_path, values, target="y")
