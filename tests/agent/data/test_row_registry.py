"""Rows keep their numbers while their table changes."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.arrow_reader import ArrowReader  # noqa: E402
from agent.data.row_registry import RowRegistry  # noqa: E402

Row = dict[str, Any]


def people(count: int, first: int = 0) -> list[Row]:
    return [
        {"name": f"p{first + n}", "age": (first + n) % 7, "pay": (first + n) * 1.5}
        for n in range(count)
    ]


class Table:
    """A file whose rows get numbers."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "table.csv"
        self.registry = RowRegistry(folder / "told.db")

    def numbers(self, rows: Sequence[Row], path: Path | None = None) -> list[int]:
        with (path or self.path).open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return self.of(path or self.path)

    def of(self, path: Path) -> list[int]:
        return self.registry.positions(ArrowReader(str(path))).tolist()


def test_numbers_follow_the_rows_not_their_places(tmp_path: Path) -> None:
    table, rows = Table(tmp_path), people(30)
    assert table.numbers(rows) == list(range(30))
    assert table.numbers([*rows, *people(2, 30)]) == [*range(30), 30, 31]
    mixed = random.Random(3).sample(range(30), 30)
    assert table.numbers([rows[n] for n in mixed]) == mixed
    assert table.numbers(rows[5:]) == list(range(5, 30)), "rows 0 to 4 were deleted"
    assert table.numbers(rows) == list(range(30)), "and are back"
    assert table.numbers([{**rows[0], "pay": 99}, *rows[1:]])[0] == 32, "an edited row is another"
    assert (tmp_path / "told.db").stat().st_mode & 0o077 == 0


def test_equal_rows_are_told_apart(tmp_path: Path) -> None:
    table, one = Table(tmp_path), people(1)
    assert table.numbers(one * 4) == [0, 1, 2, 3]
    assert table.numbers(one * 3) == [0, 1, 2]
    assert table.numbers(one * 5) == [0, 1, 2, 3, 4]


def test_another_file_format_or_column_order_has_the_same_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table, rows = Table(tmp_path), people(30)
    first = table.numbers(rows)
    turned = [dict(reversed(row.items())) for row in rows]
    assert table.numbers(turned, tmp_path / "turned.csv") == first
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert table.of(tmp_path / "t.parquet") == first
    text = table.path.read_text().replace(",", ";")
    (tmp_path / "semicolons.csv").write_text(text)
    assert table.of(tmp_path / "semicolons.csv") == first


def test_a_new_column_makes_no_new_rows(tmp_path: Path) -> None:
    table, rows = Table(tmp_path), people(30)
    first = table.numbers(rows)
    wider = [{**row, "town": f"t{n % 3}"} for n, row in enumerate(rows)]
    assert table.numbers([*wider, {**people(1, 30)[0], "town": "x"}]) == [*first, 30]
    edited = [{**wider[0], "town": "elsewhere"}, *wider[1:]]
    assert table.numbers(edited) == [31, *first[1:]], "an edit of the new column is an edit"


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.numbers(people(30))
    reader = ArrowReader(str(table.path))
    reader.batches = None  # type: ignore[method-assign,assignment]
    assert RowRegistry(tmp_path / "told.db").positions(reader).tolist() == list(range(30))


def test_an_empty_table_has_no_numbers(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.path.write_text("name,age\n")
    assert table.of(table.path) == []
