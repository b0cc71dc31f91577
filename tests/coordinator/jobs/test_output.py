"""Merged answers: any values, in each file format, with rows counted through."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.jobs.output import merge
from coordinator.jobs.state import Job, Unit
from coordinator.jobs.store import JobStore
from coordinator.storage.job_events import AnswerInfo, Block, JobSpec
from protocols.errors import CommonweightError
from tests.support.ascii_locale import in_ascii

TABLES: dict[str, list[list[Any]]] = {
    "numbers": [[0, 3, 0.25], [1, -4, 1e-9], [2, 0, 5.0]],
    "text": [[0, "a,b", 0.5], [1, 'say "c"', 1.0], [2, "d\ne", 2.5]],
    "missing": [[0, None, 1.5], [1, 2, 3.5], [2, True, 4.5]],
    "lists": [[0, [1, 2], 1.0], [1, [3], 2.0], [2, [], 3.0]],
}


def answered(tmp_path: Path, rows: list[list[Any]]) -> tuple[Job, JobStore]:
    """A job of two units with the same answer; one's is in the ledger, the other's on disk."""
    lane = JobStore(tmp_path / "jobs")
    lines = [["row", "class", "probability"], *rows]
    body = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    given = AnswerInfo(digest="d" * 64, nbytes=len(body), rows=len(rows))
    lane.version_path(given.digest).write_bytes(body)
    units = {
        n: Unit(number=n, first=n, stop=n + 1, answers={"ada": one}, verified=given.digest)
        for n, one in enumerate((given, AnswerInfo(**{**_fields(given), "body": body})))
    }
    blocks = (Block(len(rows), 1),) * 2
    return Job(id="job", spec=JobSpec(kind="scatter", blocks=blocks), units=units), lane


def _fields(given: AnswerInfo) -> dict[str, Any]:
    return {name: getattr(given, name) for name in given.__struct_fields__}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_merged_in_order(name: str, tmp_path: Path) -> None:
    rows = TABLES[name]
    job, lane = answered(tmp_path, rows)
    expected = [[n, *row[1:]] for n, row in enumerate(rows * 2)]
    assert merge(job, lane, tmp_path / "out.jsonl") == 6
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row.values()) for row in found] == expected
    assert merge(job, lane, tmp_path / "out.csv") == 6
    with (tmp_path / "out.csv").open(newline="") as file:
        names, *table = csv.reader(file)
    assert names == ["row", "class", "probability"]
    assert [int(row[0]) for row in table] == list(range(6))
    for told, values in zip(table, expected, strict=True):
        assert told[1] == ("" if values[1] is None else str(values[1]))
        assert float(told[2]) == values[2]


def test_parquet(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet is of the extra tabular")
    job, lane = answered(tmp_path, TABLES["text"])
    assert merge(job, lane, tmp_path / "out.parquet") == 6
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["row"].to_pylist() == list(range(6))
    assert table["class"].to_pylist() == [row[1] for row in TABLES["text"]] * 2


def of_units(tmp_path: Path, *columns: list[Any]) -> tuple[Job, JobStore]:
    """A job whose units answered with these values."""
    units = {}
    for n, values in enumerate(columns):
        lines = [["row", "value"], *([row, value] for row, value in enumerate(values))]
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        given = AnswerInfo(digest=f"{n}", nbytes=len(body), rows=len(values), body=body)
        units[n] = Unit(number=n, first=n, stop=n + 1, answers={"ada": given}, verified=f"{n}")
    blocks = tuple(Block(len(values), 1) for values in columns)
    lane = JobStore(tmp_path / "jobs")
    return Job(id="job", spec=JobSpec(kind="scatter", blocks=blocks), units=units), lane


@pytest.mark.parametrize(
    "columns", [([None, None], [1, 2]), ([1, 2], [0.5, None]), ([None], ["a"]), ([1], [None], [2])]
)
def test_a_column_has_one_type_in_all_units(tmp_path: Path, columns: tuple[list[Any], ...]) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet is of the extra tabular")
    job, lane = of_units(tmp_path, *columns)
    values = [value for column in columns for value in column]
    assert merge(job, lane, tmp_path / "out.parquet") == len(values)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["value"].to_pylist() == values
    assert table["row"].to_pylist() == list(range(len(values)))


@pytest.mark.parametrize("columns", [([1, "a"],), ([1], ["a"]), ([[1]], [2]), ([2**70],)])
def test_values_that_fit_no_column_type_are_an_error(
    tmp_path: Path, columns: tuple[list[Any], ...]
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet is of the extra tabular")
    job, lane = of_units(tmp_path, *columns)
    with pytest.raises(CommonweightError, match="do not fit") as caught:
        merge(job, lane, tmp_path / "out.parquet")
    assert "OUT.jsonl" in caught.value.hint
    assert list(tmp_path.glob("*out*")) == []


def test_files_are_utf8_in_any_locale(tmp_path: Path) -> None:
    job, _ = of_units(tmp_path, ["Zürich", "東京"])
    in_ascii(f"""
        import msgspec
        from pathlib import Path
        from coordinator.jobs.store import JobStore
        from coordinator.jobs.output import merge
        from coordinator.jobs.state import Job
        job = msgspec.json.decode({msgspec.json.encode(job)!r}, type=Job)
        merge(job, JobStore(Path({str(tmp_path / "jobs")!r})), Path({str(tmp_path / "out.csv")!r}))
    """)
    assert "東京" in (tmp_path / "out.csv").read_text(encoding="utf-8")
