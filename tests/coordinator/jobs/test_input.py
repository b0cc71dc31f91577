"""Rows are cut into blocks: each record of any file is in one block, complete and in order."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.jobs.input import prepare

VALUES = st.one_of(
    st.integers().map(str), st.text(st.sampled_from('ab ,"\n\r'), max_size=6), st.just("")
)


def blocks(path: Path, folder: Path) -> list[bytes]:
    found = prepare(path, folder, ".bytes")
    data = io.BytesIO((folder / f"{found.digest}.bytes").read_bytes())
    return [data.read(block.nbytes) for block in found.blocks]


def rows(text: bytes) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(text.decode(), newline="")) if any(row)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers().map(str), VALUES), min_size=1, max_size=60),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_csv(table: list[tuple[str, str]], ends: str, whole: bool) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=ends).writerows([("n", "text"), *table])
    text = out.getvalue().encode()
    with TemporaryDirectory() as name:
        path = Path(name) / "rows.csv"
        path.write_bytes(text if whole else text.removesuffix(ends.encode()))
        found = [rows(block) for block in blocks(path, Path(name))]
    assert all(block[0] == ["n", "text"] for block in found)
    assert [row for block in found for row in block[1:]] == rows(text)[1:]


@pytest.mark.parametrize("blank", [b"\n", b"  \n", b"\r\n"])
@pytest.mark.parametrize("before", range(14, 19))
def test_blank_lines_are_no_rows(tmp_path: Path, blank: bytes, before: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a,b\n" + b"1,2\n" * before + blank + b"3,4\n" * 16 + b"5,6")
    found = prepare(path, tmp_path, ".bytes")
    assert sum(block.rows for block in found.blocks) == before + 17


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"one\r\ntwo\n\nfour")
    assert blocks(path, tmp_path) == [b"one\ntwo\n\nfour\n"]
