"""The sample tables of the tutorial: complete, alike each time, never written over other files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.cli.demo import sample_tables, trial_tables
from coordinator.cli.main import app
from protocols.errors import UsageError


def test_three_clinics_and_new_patients(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    done = CliRunner().invoke(app, ["demo", "--write-sample", str(folder)])
    assert done.exit_code == 0, done.output
    assert [Path(line).name for line in done.stdout.splitlines()] == [
        "north.csv", "south.csv", "west.csv", "new-patients.csv",
    ]  # fmt: skip
    for name, (count, _, separator) in sample_tables.CLINICS.items():
        with (folder / f"{name}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=separator))
        assert len(rows) == count
        assert {row[sample_tables.TARGET] for row in rows} == {"yes", "no"}
        assert sum(not row["pressure"] for row in rows) < count / 10
    first = (folder / sample_tables.NEW_PATIENTS).read_text().splitlines()[0]
    assert sample_tables.TARGET not in first


def test_each_call_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (sample_tables.write(tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_no_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "west.csv").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        sample_tables.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["west.csv"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write into"):
        sample_tables.write(tmp_path / "file" / "folder")


def test_a_trial_is_written_as_each_clinic_writes(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--write-trial", str(tmp_path)])
    assert done.exit_code == 0, done.output
    tables = {}
    for name, (count, _) in trial_tables.CLINICS.items():
        with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
            tables[name] = [*csv.DictReader(file, delimiter=";" if name == "turku" else ",")]
        assert len(tables[name]) == count
        assert {*tables[name][0]} == {"patient", *trial_tables.COLUMNS}
    assert {row["smoker"] for row in tables["lund"]} == {"YES", "NO", ""}
    assert {row["smoker"] for row in tables["bergen"]} == {"1", "0", ""}
    assert all("," in row["time"] for row in tables["turku"])
    with pytest.raises(UsageError, match="exists already"):
        trial_tables.write(tmp_path)
