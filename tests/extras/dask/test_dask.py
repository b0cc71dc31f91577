"""Tables that Dask reads are those that the default reader sees."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings

from agent.data import open_table
from agent.data.dask_reader import client
from agent.data.settings import DataSettings
from protocols.errors import DataError
from tests.extras.same_tables import (
    FORMS,
    ROWS,
    check_answers,
    check_pandas,
    check_rows,
    check_statistics,
    table,
)
from tests.support.tables import Rows, write_csv


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_and_statistics(tmp_path: Path, form: str) -> None:
    path = table(tmp_path, form)
    data = DataSettings(path=str(path), reader="dask", min_count=1, extremes=True)
    check_rows(open_table(data), path)
    check_statistics(data)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_any_table_has_the_same_answers_and_statistics(rows: Rows) -> None:
    with TemporaryDirectory() as folder:
        path = write_csv(Path(folder) / "t.csv", rows)
        data = DataSettings(path=str(path), reader="dask", min_count=1, extremes=True)
        check_answers(data)
        check_statistics(data)
        check_pandas(path)


def test_on_a_cluster_of_ones_own(tmp_path: Path) -> None:
    from distributed import LocalCluster

    path = table(tmp_path, "files")
    with LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        reader = f"dask:{cluster.scheduler_address}"
        data = DataSettings(path=str(path), reader=reader, min_count=1, extremes=True)
        check_statistics(data)
        check_rows(open_table(data), path)
        client(cluster.scheduler_address).close()


def test_what_is_wrong_is_told_without_the_files_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("x,y\nZürich,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8 text") as caught:
        list(open_table(DataSettings(path=str(latin), reader="dask")).batches(["x"]))
    assert "latin.csv" not in caught.value.message
