"""A column of the table that comes with the predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.inference import id_columns
from protocols.errors import DataError, UnknownName, UsageError

ROWS = 7


@pytest.fixture
def table(tmp_path: Path) -> str:
    lines = ["patient,age", *(f"p-{number},{40 + number}" for number in range(ROWS))]
    (tmp_path / "new.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "new.csv")


def answers(*sizes: int) -> Iterator[dict[str, list[Any]]]:
    first = 0
    for size in sizes:
        yield {"row": list(range(first, first + size)), "ill": ["no"] * size}
        first += size


def test_each_answer_has_the_id_of_its_row(table: str) -> None:
    batches = list(id_columns.copied(answers(3, 0, 4), table, "patient"))
    assert [list(batch) for batch in batches] == [["patient", "row", "ill"]] * 3
    rows = [row for b in batches for row in zip(b["patient"], b["row"], strict=True)]
    assert rows == [(f"p-{number}", number) for number in range(ROWS)]


def test_a_column_that_cannot_be_copied_is_refused(table: str) -> None:
    with pytest.raises(UnknownName, match="no column 'patent'") as caught:
        list(id_columns.copied(answers(7), table, "patent"))
    assert caught.value.hint == "it has patient, age"
    with pytest.raises(UsageError, match="have a column 'age' already"):
        list(id_columns.copied(iter([{"age": [1]}]), table, "age"))
    with pytest.raises(DataError, match="fewer rows than answers"):
        list(id_columns.copied(answers(8), table, "patient"))
