"""Sets of rows by number, and sums that tell of few peers: beside a search through all sets of
peers and small factors."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.analytics import row_sets
from protocols.analytics.row_sets import MAX_ROW_SETS, PRIME, add, by_bin, join_bins
from protocols.errors import Refused

some_rows = st.lists(st.integers(0, 7), unique=True, max_size=8).map(sorted)


def as_numbers(rows: list[int]) -> row_sets.Numbers:
    return np.array(rows, np.int64)


@given(st.lists(some_rows, max_size=7))
def test_a_set_is_told_by_others_exactly_if_it_follows_from_them(sets: list[list[int]]) -> None:
    basis: dict[int, row_sets.Numbers] = {}
    found = row_sets.number_sets(basis, [as_numbers(rows) for rows in sets])
    vectors = np.array([[row in rows for row in range(8)] for rows in sets], np.float64)
    rank = np.linalg.matrix_rank(vectors) if len(vectors) else 0
    assert len(basis) == rank, "no set of the basis follows from others"
    for rows, factors in zip(sets, found, strict=True):
        total = np.zeros(8, np.int64)
        for number, factor in factors.items():
            total[basis[number]] += factor
        assert (total % PRIME).nonzero()[0].tolist() == rows
    again = row_sets.number_sets(basis, [as_numbers(rows) for rows in sets])
    assert (again, len(basis)) == (found, rank)


def test_a_group_and_the_others_are_all_rows() -> None:
    basis: dict[int, row_sets.Numbers] = {}
    everybody, women, men = (np.arange(60)[start::step] for start, step in ((0, 1), (0, 2), (1, 2)))
    whole, some, others = row_sets.number_sets(basis, [everybody, women, men])
    (one, two) = basis
    assert (whole, some, add([some, others])) == ({one: 1}, {two: 1}, whole)
    assert row_sets.number_sets(basis, [women[:0]]) == [{}]
    full = {n: np.array([n]) for n in range(MAX_ROW_SETS)}
    with pytest.raises(Refused, match="sets of rows in secure sums"):
        row_sets.number_sets(full, [everybody + MAX_ROW_SETS])


def test_time_bins_of_few_peers_are_joined_with_the_next() -> None:
    """A bin without rows with the event, or without it, is fine."""
    every = {"1 0.0": {0: 1}, "0 0.0": {1: 1}, "1 2.0": {2: 1}, "0 2.0": {3: 1}, "1 5.0": {4: 1}}
    assert join_bins([2.0, 5.0], [[every] * 3], 3) == [2.0, 5.0]
    some = every | {"1 2.0": {}}
    assert join_bins([2.0, 5.0], [[every] * 3, [every, every, some]], 3) == [2.0]
    assert join_bins([2.0, 5.0], [[every, some, every | {"1 5.0": {}}]], 3) == [2.0]
    assert join_bins([2.0, 5.0], [[every, every, every | {"1 0.0": {}}]], 3) == [5.0]
    assert join_bins([2.0], [[every, {}, {}]], 3) == []
    assert by_bin(every, [5.0]) == {
        "0": {0: 1, 2: 1},
        "1": {4: 1},
        "2": {1: 1, 3: 1},
    }


Sum = dict[str, int]
sums = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2), max_size=4), min_size=1, max_size=4
)


def as_rows(one: Sum) -> row_sets.SumRows:
    return tuple((peer, ((number, 1),)) for peer, number in sorted(one.items()))


def left_at(some: list[Sum], factors: tuple[int, ...]) -> set[str]:
    """The peers at which a combination of sums does not vanish."""
    total: dict[tuple[str, int], int] = {}
    for factor, one in zip(factors, some, strict=True):
        for place in one.items():
            total[place] = total.get(place, 0) + factor
    return {peer for (peer, _), factor in total.items() if factor}


@settings(max_examples=60)
@given(sums, st.integers(2, 3))
def test_few_peers_are_isolated_exactly_if_some_combination_does(
    asked: list[Sum], minimum: int
) -> None:
    least = min(
        (
            len(left)
            for f in product(range(-3, 4), repeat=len(asked))
            if (left := left_at(asked, f))
        ),
        default=minimum,
    )
    found = row_sets.isolates_few([], [*map(as_rows, asked)], "abcd", minimum)
    assert found == (least < minimum)


def test_what_earlier_sums_tell_alone_refuses_no_others() -> None:
    """The owner has come to trust a peer that sums were with and without."""
    known = [as_rows(dict.fromkeys("abcd", 0)), as_rows(dict.fromkeys("abc", 0))]
    assert row_sets.isolates_few([], known, "abcd", 3)
    assert not row_sets.isolates_few([], known, "abc", 3)
    other = as_rows(dict.fromkeys("abcd", 1))
    assert not row_sets.isolates_few(known, [other], "abcd", 3)
    few = [as_rows(dict.fromkeys("abcd", 1) | {peer: 2}) for peer in "ad"]
    assert row_sets.isolates_few([*known, other], few[:1], "abcd", 3)
    assert row_sets.isolates_few([*known, other], few[1:], "abcd", 3), "d is known in set 0 alone"


def test_many_peers_take_no_search_through_all_sets_of_them() -> None:
    names = [f"p{number:03}" for number in range(200)]
    everybody, some = dict.fromkeys(names, 0), dict.fromkeys(names, 1)
    for alike, isolates in ((198, True), (197, False)):
        second = some | dict.fromkeys(names[:alike], 0)
        assert row_sets.isolates_few([as_rows(everybody)], [as_rows(second)], names, 3) == isolates
