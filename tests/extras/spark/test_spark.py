"""Tables that Spark reads are those that the default reader sees."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings

from agent.data import open_table
from agent.data.settings import DataSettings
from agent.data.spark_reader import check_java
from protocols.errors import CommonweightError, DataError
from tests.extras.same_tables import (
    FORMS,
    ROWS,
    check_answers,
    check_rows,
    check_statistics,
    table,
)
from tests.support.tables import Rows, write_csv


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_and_statistics(tmp_path: Path, form: str) -> None:
    path = table(tmp_path, form)
    data = DataSettings(path=str(path), reader="spark:local[2]", min_count=1, extremes=True)
    check_rows(open_table(data), path)
    check_statistics(data)


@pytest.mark.timeout(540)  # each example is a dozen jobs of a JVM
@settings(max_examples=4, deadline=None)
@given(rows=ROWS)
def test_any_table_has_the_same_answers_and_statistics(rows: Rows) -> None:
    with TemporaryDirectory() as folder:
        path = write_csv(Path(folder) / "t.csv", rows)
        data = DataSettings(path=str(path), reader="spark:local[2]", min_count=1, extremes=True)
        check_answers(data)
        check_statistics(data)


def test_bytes_that_are_no_text_are_told_and_not_replaced(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("x,y\nplain,1\nZürich,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8 text") as caught:
        list(open_table(DataSettings(path=str(latin), reader="spark:local[2]")).batches(["x"]))
    assert "latin.csv" not in caught.value.message
    replaced = write_csv(tmp_path / "replaced.csv", [{"x": "Z\ufffdrich", "y": "1"}])
    (batch,) = open_table(DataSettings(path=str(replaced), reader="spark:local[2]")).batches(["x"])
    assert batch.column("x").to_pylist() == ["Z\ufffdrich"]


def test_without_java_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        CommonweightError, match="Spark needs Java 17 or newer, which is not installed"
    ) as caught:
        check_java()
    assert "openjdk-17" in caught.value.hint
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    with pytest.raises(CommonweightError, match="which is not installed") as caught:
        check_java()
    assert "11 is here" in caught.value.hint
