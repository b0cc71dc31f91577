"""Statistics of parts merge to those of the whole, in any order."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from protocols.errors import BadMessage
from protocols.model import schema_card
from protocols.tables import statistics
from protocols.tables.statistics import ColumnStatistics, Moments, TableStatistics

VALUES = arrays(np.float64, st.integers(0, 60), elements=st.floats(-1e6, 1e6))
PARTS = st.lists(VALUES, min_size=1, max_size=6)
TEXTS = st.lists(st.sampled_from("abcdefg"), max_size=30)


def of_numbers(values: np.ndarray) -> ColumnStatistics:
    extremes = (float(values.min()), float(values.max())) if len(values) else None
    return ColumnStatistics(
        kind="number", moments=statistics.compute_moments(values), extremes=extremes, whole=False
    )


def of_texts(values: list[str]) -> ColumnStatistics:
    return ColumnStatistics(kind="text", categories={v: values.count(v) for v in set(values)})


@given(PARTS, st.randoms())
def test_moments_of_parts_are_those_of_the_union(parts: list[np.ndarray], random: object) -> None:
    random.shuffle(parts)  # type: ignore[attr-defined]
    union = np.concatenate(parts)
    tables = [TableStatistics(rows=len(p), columns={"x": of_numbers(p)}) for p in parts]
    found = statistics.merge(tables).columns["x"]
    assert found.moments.count == len(union)
    if len(union):
        spread = max(float(np.abs(union).max()), 1e-300)
        assert found.moments.mean == pytest.approx(union.mean(), rel=1e-9, abs=1e-9 * spread)
        assert found.moments.variance == pytest.approx(
            union.var(), rel=1e-9, abs=max(1e-9 * spread * spread, 1e-300)
        )
        assert found.extremes == (union.min(), union.max())


def test_a_large_mean_does_not_cost_the_variance() -> None:
    rng = np.random.default_rng(0)
    union = 1e9 + rng.normal(size=10_000)
    parts = np.split(union, [10, 11, 5000])
    found = statistics.merge(
        TableStatistics(rows=len(p), columns={"x": of_numbers(p)}) for p in parts
    ).columns["x"]
    assert found.moments.variance == pytest.approx(union.var(), rel=1e-9)


@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 6))
def test_counts_add_up_and_rare_values_stay(parts: list[list[str]], least: int) -> None:
    tables = [TableStatistics(rows=len(p), columns={"x": of_texts(p)}) for p in parts]
    of_each = [statistics.without_rare_values(table, least).columns["x"] for table in tables]
    for part, column in zip(parts, of_each, strict=True):
        common = {v: part.count(v) for v in part if part.count(v) >= least}
        rare = len(part) - sum(common.values())
        if common and rare < least:  # not told either: they count as the most frequent one
            common[max(common, key=lambda v: (common[v], v))] += rare
            rare = 0
        assert (column.categories, column.others) == (common, rare)
    told = statistics.merge(TableStatistics(rows=0, columns={"x": one}) for one in of_each)
    found = told.columns["x"]
    assert sum(found.categories.values()) + found.others == sum(map(len, parts))


def test_a_column_that_a_part_lacks_is_missing_there() -> None:
    a = TableStatistics(rows=3, columns={"x": of_texts(["a", "b", "b"])})
    b = TableStatistics(rows=2, columns={})
    found = statistics.merge([b, a]).columns["x"]
    assert (found.kind, found.missing, found.categories) == ("text", 2, {"a": 1, "b": 2})


def test_too_many_different_texts_are_no_categories_in_any_order() -> None:
    halves = [
        of_texts([f"{start + i}" for i in range(statistics.MAX_CATEGORIES * 2 // 3)])
        for start in (0, 10_000)
    ]
    one, other = (statistics.merge_columns(*pair) for pair in (halves, halves[::-1]))
    assert one == other
    assert one.many
    assert one.categories == {}
    assert one.others == 2 * (statistics.MAX_CATEGORIES * 2 // 3)


def test_hashes_stand_in_for_values() -> None:
    table = TableStatistics(rows=2, columns={"x": of_texts(["Ann", "Ann"])})
    told = statistics.without_rare_values(table, 1, hashed=["x"])
    assert "Ann" not in msgspec.json.encode(told).decode()
    assert list(told.columns["x"].categories) == [statistics.hash_category("x", "Ann")]


def test_the_order_of_a_vocabulary() -> None:
    counts = dict.fromkeys(["b", "10", "9", "a", "2.5", "nan"], 1)
    assert statistics.sort_categories(counts) == ("2.5", "9", "10", "a", "b", "nan")


@pytest.mark.parametrize(
    "column",
    [
        '{"kind":"number","moments":[-1,0,0]}',
        '{"kind":"number","moments":[1,0,-1]}',
        '{"kind":"number","moments":[1,1e999,0]}',
        '{"kind":"number","moments":[1,null,0]}',
        '{"kind":"text","categories":{"a":-1}}',
        '{"kind":"text","categories":{"\\u001b[2J":1}}',
        '{"kind":"rows"}',
    ],
)
def test_hostile_statistics_are_refused(column: str) -> None:
    with pytest.raises(BadMessage):
        schema_card.decode(table(column))


def table(column: str) -> bytes:
    return f'{{"type":"table","rows":1,"columns":{{"x":{column}}}}}'.encode()


def test_whole_statistics_are_read() -> None:
    told = schema_card.decode(table('{"kind":"number","moments":[1,0.5,0]}'))
    assert isinstance(told, TableStatistics)
    assert told.columns["x"].moments == Moments(1, 0.5, 0.0)


def test_moments_of_nothing() -> None:
    assert statistics.compute_moments(np.empty(0)) == Moments()
    assert Moments().variance == 0
