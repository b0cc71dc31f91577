"""Two sets of rows that were ever told differ in none or in many rows."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.data.disclosed_sets import DisclosedSets, ToldSet, Use
from protocols.errors import HomeError, NotAllowed

MIN = 5


def rows(numbers: Iterable[int], use: Use = "cell") -> ToldSet:
    return ToldSet(use, np.array(sorted(numbers), np.int64))


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(0, 40), min_size=1), min_size=1, max_size=12))
def test_what_was_told_never_isolates_few_rows(
    tmp_path_factory: pytest.TempPathFactory, asked: list[set[int]]
) -> None:
    memory = DisclosedSets(tmp_path_factory.mktemp("sets") / "told.db")
    told: list[set[int]] = []
    for numbers in asked:
        close = any(0 < len(numbers ^ old) < MIN for old in told)
        try:
            memory.tell([rows(numbers)], MIN)
        except NotAllowed:
            assert close, "refused without a reason"
        else:
            assert not close, "told, and few rows follow"
            told.append(numbers)
    memory.close()


def test_the_memory_outlives_a_restart_and_is_shared_by_processes(tmp_path: Path) -> None:
    first, second = DisclosedSets(tmp_path / "told.db"), DisclosedSets(tmp_path / "told.db")
    first.tell([rows(range(100))], MIN)
    with pytest.raises(NotAllowed, match=r"reveal a few rows alone.*data_min_count is 5"):
        second.tell([rows(range(101))], MIN)
    with pytest.raises(NotAllowed):
        DisclosedSets(tmp_path / "told.db").tell([rows(range(1, 100))], MIN)
    second.tell([rows(range(105))], MIN)
    with pytest.raises(NotAllowed):
        first.tell([rows(range(104))], MIN)
    assert (tmp_path / "told.db").stat().st_mode & 0o077 == 0


def test_one_of_two_sets_at_the_same_time_is_told(tmp_path: Path) -> None:
    memories = [DisclosedSets(tmp_path / "told.db") for _ in range(8)]
    outcomes: list[bool] = []

    def tell(number: int) -> None:
        try:
            memories[number].tell([rows(range(100 + number % 4))], MIN)
            outcomes.append(True)
        except NotAllowed:
            outcomes.append(False)

    threads = [threading.Thread(target=tell, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert outcomes.count(True) == 2, "one set, by the two that asked for it"


def test_a_damaged_memory_tells_nothing(tmp_path: Path) -> None:
    file = tmp_path / "told.db"
    file.write_bytes(b"no database" * 100)
    with pytest.raises(HomeError, match="memory of what was told"):
        DisclosedSets(file)


def test_sets_of_one_answer_are_compared_too(tmp_path: Path) -> None:
    memory = DisclosedSets(tmp_path / "told.db")
    with pytest.raises(NotAllowed):
        memory.tell([rows(range(100)), rows(range(99))], MIN)
    memory.tell([rows(range(99))], MIN)  # a refusal records nothing


def test_states_of_a_table_differ_on_both_sides(tmp_path: Path) -> None:
    """One row gone and five new ones: an answer about the new ones would reveal the one."""
    memory = DisclosedSets(tmp_path / "told.db")
    memory.tell([rows(range(100), "table")], MIN)
    with pytest.raises(NotAllowed, match="a few rows alone"):
        memory.tell([rows(range(1, 110), "table")], MIN)
    memory.tell([rows(range(5, 110), "table")], MIN)
    with pytest.raises(NotAllowed):
        memory.tell([rows(range(5, 109))], MIN)  # another use


def test_the_parts_of_one_table_are_not_compared(tmp_path: Path) -> None:
    memory = DisclosedSets(tmp_path / "told.db")
    memory.tell([rows(range(20), "table")], MIN)
    memory.tell([rows(range(16), "train"), rows(range(16, 20), "held")], MIN)
