"""An iterator that works ahead: same items, same order, same errors, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from coordinator.strategies.prefetch import prefetch


def counting(most: int, closed: list[int], fail_at: int = -1) -> Generator[int, None, None]:
    made = 0
    try:
        for number in range(most):
            if number == fail_at:
                raise ValueError(f"no {number}")
            made += 1
            yield number
    finally:
        closed.append(made)


@pytest.mark.parametrize("depth", [1, 3])
def test_gives_the_same_items_in_order(depth: int) -> None:
    closed: list[int] = []
    assert list(prefetch(counting(50, closed), depth)) == list(range(50))
    assert closed == [50]


def test_is_made_in_another_thread() -> None:
    def who() -> Generator[int, None, None]:
        yield threading.get_ident()

    assert list(prefetch(who())) != [threading.get_ident()]


def test_raises_an_error_where_its_item_would_have_come() -> None:
    closed: list[int] = []
    items = prefetch(counting(9, closed, fail_at=3))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no 3"):
        next(items)
    assert closed == [3]


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_a_reader_that_gives_up_ends_the_work(taken: int) -> None:
    closed: list[int] = []
    before = threading.active_count()
    items = prefetch(counting(1_000_000, closed))
    for _ in range(taken):
        next(items)
    items.close()
    assert len(closed) == 1
    assert closed[0] < taken + 5
    assert threading.active_count() == before


def test_pipelines_nest() -> None:
    closed: list[int] = []

    def doubled() -> Generator[int, None, None]:
        for number in prefetch(counting(30, closed)):
            yield 2 * number

    assert list(prefetch(doubled())) == list(range(0, 60, 2))
