"""The audit of sums finds each combination about few rows that an exhaustive search finds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.analytics.linear_audit import isolates_few

ROWS = 9
_sets = st.lists(st.integers(1, 2**ROWS - 1), min_size=1, max_size=6)


def _by_hand(matrix: np.ndarray, min_rows: int) -> bool:
    """Whether a combination vanishes outside of fewer than `min_rows` rows, for any such rows."""
    rank = np.linalg.matrix_rank(matrix)
    few = combinations(range(ROWS), min_rows - 1)
    return any(np.linalg.matrix_rank(np.delete(matrix, some, axis=1)) < rank for some in few)


@settings(max_examples=200, deadline=None)
@given(_sets, st.integers(2, 4))
def test_combinations_about_few_rows_are_found(codes: list[int], min_rows: int) -> None:
    matrix = np.array([[code >> row & 1 for row in range(ROWS)] for code in codes], float)
    sets = [np.flatnonzero(row) for row in matrix]
    assert isolates_few([], sets, min_rows) == _by_hand(matrix, min_rows)


def test_what_was_told_before_does_not_count_again() -> None:
    old = [np.arange(100), np.arange(99)]
    assert isolates_few([], old, 5)
    assert not isolates_few(old, [*old, np.arange(50)], 5)
