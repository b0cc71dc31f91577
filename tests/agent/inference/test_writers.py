"""Answers in every form, and what a machine notes of what leaves it."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from agent.home import audit_log
from agent.inference import writers
from protocols.errors import UsageError
from protocols.messages.work import UpdateClaim


def two_batches() -> Iterator[dict[str, Any]]:
    yield {"row": range(2), "city": ["Zürich", 'a "b", c'], "p": np.array([0.5, 0.25])}
    yield {"row": range(2, 3), "city": ["Bern"], "p": np.array([1.0])}


ROWS = [(0, "Zürich", 0.5), (1, 'a "b", c', 0.25), (2, "Bern", 1.0)]


def test_csv_goes_to_a_file_or_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.csv"
    assert writers.write(two_batches(), out) == 3
    assert writers.write(two_batches(), None) == 3
    assert out.read_text() == capsys.readouterr().out
    assert out.read_text() == 'row,city,p\n0,Zürich,0.5\n1,"a ""b"", c",0.25\n2,Bern,1.0\n'


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    writers.write(two_batches(), lines)
    writers.write(two_batches(), table)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [tuple(row.values()) for row in found] == ROWS
    assert [tuple(row.values()) for row in pq.read_table(table).to_pylist()] == ROWS


def test_what_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"x": [1]}
        raise ValueError("the second batch")

    for suffix in writers.SUFFIXES:
        with pytest.raises(ValueError, match="the second batch"):
            writers.write(broken(), tmp_path / f"a{suffix}")
    for wrong in ("a.xlsx", "a", "no/folder/a.csv"):
        with pytest.raises(UsageError):
            writers.write(two_batches(), tmp_path / wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has /proc, where a file cannot be made"
)
def test_where_nothing_can_be_written_the_owner_reads_why() -> None:
    for place in ("/proc/a.csv", "/proc/a.parquet"):
        with pytest.raises(UsageError, match=f"cannot write {place}: "):
            writers.write(two_batches(), Path(place))


def claim(**changed: Any) -> UpdateClaim:
    fields = {"run": "r", "round": 1, "kind": "train", "peer": "P", "base": "b", "digest": "d" * 64}
    return UpdateClaim(**{**fields, "nbytes": 7, "num_examples": 5, "nonce": "n", **changed})


def test_what_left_is_noted_for_the_owner_alone(tmp_path: Path) -> None:
    audit_log.write_update(tmp_path, claim(kind="describe"), "tabular", b'{"rows":3}')
    audit_log.write_update(tmp_path, claim(metrics={"loss": 0.5, "nan": None}), "tabular", b"")
    audit_log.write_update(tmp_path, claim(kind="unknown"), "tabular", b"")
    with (tmp_path / audit_log.FILE).open("ab") as file:
        file.write(b'{"at": 1, "run"')  # a power cut
    sums = {"confusion": [3.0, 1.0, 0.0, 4.0]}
    audit_log.write_update(tmp_path, claim(kind="evaluate", tallies=sums), "tabular", b"")
    told = audit_log.read(tmp_path)
    last = told.pop()
    assert (last.what, last.tallies) == ("evaluation", sums)
    assert audit_log.format_entry(last).endswith("4 sums of confusion")
    assert [(one.what, one.told) for one in told] == [
        ("description", '{"rows":3}'),
        ("weights", ""),
    ]
    assert "weights, 7 bytes dddddddddddd as fp32, 5 examples, loss 0.5" in audit_log.format_entry(
        told[1]
    )
    assert stat.S_IMODE((tmp_path / audit_log.FILE).stat().st_mode) == 0o600


def test_the_list_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 2000)
    for number in range(100):
        audit_log.write_update(tmp_path, claim(round=number), "t", b"")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6000
    assert [one.round for one in audit_log.read(tmp_path)][-1] == 99
