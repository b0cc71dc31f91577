"""What every reader of tables must come to: the statistics and the rows of the default one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from agent.data import Reader, open_table, survey
from agent.tasks import DataSettings
from protocols.preprocessing import wanted
from tests.agent.data.tables import MIXED, write_csv, write_parquet

FORMS = ("csv", "semicolons", "files", "parquet")


def table(folder: Path, form: str) -> Path:
    """The same rows in one form or another."""
    if form == "parquet":
        return write_parquet(folder / "t.parquet", MIXED)
    if form == "files":  # of different orders of columns
        write_csv(folder / "t1.csv", MIXED[:70])
        write_csv(folder / "t2.csv", MIXED[70:], sorted(MIXED[0]))
        return folder
    return write_csv(folder / "t.csv", MIXED, separator=";" if form == "semicolons" else ",")


def check_rows(reader: Reader, path: Path) -> None:
    """The same columns, and the same rows in whatever order."""
    default = open_table(DataSettings(path=str(path)))
    assert reader.columns() == default.columns()
    names = ["label", "age", "note", "city"]
    assert _rows(reader, names) == _rows(default, names)


def _rows(reader: Reader, names: list[str]) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for batch in reader.batches(names):
        assert batch.schema.names == names
        found.update(tuple(str(row[n] or "") for n in names) for row in batch.to_pylist())
    return found


def check_statistics(data: DataSettings) -> None:
    """The same statistics, to what float64 can hold."""
    asked = wanted({"target": "label", "scaling": "minmax"})
    found, expected = (
        survey.survey(open_table(one), one, asked)
        for one in (data, msgspec.structs.replace(data, reader="arrow"))
    )
    assert found.rows == expected.rows
    assert found.columns.keys() == expected.columns.keys()
    for name, column in found.columns.items():
        other = expected.columns[name]
        assert msgspec.structs.replace(column, moments=other.moments) == other
        for one, two in zip(
            msgspec.to_builtins(column.moments), msgspec.to_builtins(other.moments), strict=True
        ):
            assert one == pytest.approx(two, rel=1e-12)
