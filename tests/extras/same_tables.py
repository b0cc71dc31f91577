"""What every reader of tables must come to: the statistics and the rows of the default one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from agent.analytics.compute import Group, find_cells, read_table
from agent.analytics.cut_points import CutPoints
from agent.analytics.figures import compute_figure
from agent.data import Reader, open_table, profile
from agent.data.settings import DataSettings
from coordinator.jobs import analysis
from protocols.analytics.mergeable_states import State, WithheldState
from protocols.analytics.parser import parse_query
from protocols.analytics.query import Query
from protocols.tables.preprocessing import parse_settings
from tests.support.tables import MIXED, write_csv, write_parquet

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
    asked = parse_settings({"target": "label", "scaling": "minmax"})
    found, expected = (
        profile.survey(open_table(one), one, asked)
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


# --- any tables ------------------------------------------------------------------------------

_CITIES = ("Bern", "Zürich", " Basel ", 'a "b", c', "two\nlines", "", "n/a", "\ufffd")
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "age": st.one_of(st.just(""), st.integers(-5, 120).map(str)),
            "income": st.one_of(
                st.sampled_from(["", "NA"]),
                st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: f"{value:.6g}"),
            ),
            "city": st.sampled_from(_CITIES),
            "label": st.sampled_from(["yes", "no"]),
        }
    ),
    min_size=3,
    max_size=60,
).map(lambda rows: [*rows, {"age": "41", "income": "12.5", "city": "Bern", "label": "no"}])
QUESTIONS = tuple(
    map(
        parse_query,
        (
            "count, missing(age), sum(income), mean(age), var(income), min(age), max(income), "
            "cov(age, income), corr(age, income), quantile(income, 0.5), "
            "histogram(age, 5, 0, 100), distinct(city)",
            "count, mean(age), distinct(age) by city",
            "count, mean(income) by label",
        ),
        ("", "", "age >= 20 and city != 'Bern'"),
    )
)


def check_answers(data: DataSettings) -> None:
    """Every question comes to the same statistics and groups as with the default reader."""
    for asked in QUESTIONS:
        found, expected = (
            _states(asked, one) for one in (data, msgspec.structs.replace(data, reader="arrow"))
        )
        assert found.keys() == expected.keys()
        for group, states in found.items():
            for state, other in zip(states, expected[group], strict=True):
                check_alike(msgspec.to_builtins(state), msgspec.to_builtins(other))


def _states(asked: Query, data: DataSettings) -> dict[Group, list[State]]:
    """The states of each cell, without the rules for few rows."""
    table = read_table(asked, open_table(data), ("*",))

    def cuts_of(name: str) -> CutPoints:
        return CutPoints(name, table.numbers(name), 0)

    return {
        group: [compute_figure(op, table, rows, cuts_of, 1).state for op in asked.operations]
        for group, rows in find_cells(asked, table, cuts_of, 1).rows.items()
    }


def check_alike(one: Any, two: Any) -> None:
    """The same structure, and the same numbers to what float64 can hold."""
    match two:
        case dict():
            assert one.keys() == two.keys()
            for key, value in two.items():
                check_alike(one[key], value)
        case list() | tuple():
            assert len(one) == len(two)
            for value, other in zip(one, two, strict=True):
                check_alike(value, other)
        case float():
            assert one == pytest.approx(two, rel=1e-9, abs=1e-6)
        case _:
            assert one == two


def check_pandas(path: Path) -> None:
    """What the default reader comes to is what pandas says of the same file."""
    import pandas as pd

    frame = pd.read_csv(path, keep_default_na=False, na_values={"age": [""], "income": ["", "NA"]})
    asked = parse_query("count, missing(age), sum(income), mean(age), min(age), max(income)")
    cells = _states(asked, DataSettings(path=str(path)))[()]
    told = [analysis.figure(op, state) for op, state in zip(asked.operations, cells, strict=True)]
    figures = (
        len(frame),
        frame.age.isna().sum(),
        frame.income.sum(),
        frame.age.mean(),
        frame.age.min(),
        frame.income.max(),
    )
    for state, figure, expected in zip(cells, told, figures, strict=True):
        if not isinstance(state, WithheldState):  # few values, or one that dominates a sum
            assert figure == pytest.approx(expected, nan_ok=True)
