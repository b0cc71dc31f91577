"""New rows wait for others, and a row stays on its side of the split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from agent.data.admission import HELD_OUT_OF, Admission
from agent.data.disclosed_sets import Numbers
from agent.setup import own_data

MIN = 5


def numbers(of: Iterable[int]) -> Numbers:
    return np.array(list(of), np.int64)


def draw(new: npt.NDArray[np.bool_], group: int) -> npt.NDArray[np.bool_]:
    return np.arange(int(new.sum())) % HELD_OUT_OF == 0


def test_new_rows_wait_for_others_and_the_owner_sees_it(tmp_path: Path) -> None:
    admission = Admission(tmp_path / "told" / "told.db")
    assert admission.admit(numbers(range(30)), MIN).all()
    assert own_data.waiting_rows(tmp_path) == ""
    mask = admission.admit(numbers([30, *range(30), 31, 32]), MIN)
    assert np.flatnonzero(~mask).tolist() == [0, 31, 32]
    assert own_data.waiting_rows(tmp_path) == (
        "30 rows may be used; 3 new rows wait until 5 have come"
    )
    assert admission.admit(numbers(range(35)), MIN).all()
    assert admission.admit(numbers(range(10)), MIN).all(), "deleted rows are gone"
    assert own_data.waiting_rows(tmp_path / "elsewhere") == ""


def test_rows_stay_on_their_side(tmp_path: Path) -> None:
    admission = Admission(tmp_path / "told.db")
    every = numbers(range(40))
    first = admission.split("s", every, np.ones(40, bool), MIN, draw)
    assert np.array_equal(first.held_out, draw(np.ones(40, bool), 0))
    mixed = every[::-1]
    again = admission.split("s", mixed, np.ones(40, bool), MIN, draw)
    assert np.array_equal(again.held_out, first.held_out[::-1])
    grown = numbers(range(45))
    more = admission.split("s", grown, np.ones(45, bool), MIN, draw)
    assert np.array_equal(more.held_out[:40], first.held_out)
    assert more.train[40:].all(), "one held-out row alone would be told by its loss"
    large = admission.split("s", numbers(range(95)), np.ones(95, bool), MIN, draw)
    assert np.array_equal(large.held_out[45:], draw(np.ones(50, bool), 2))
    assert not (large.train & large.held_out).any()


@pytest.mark.parametrize("absent", [1, 4])
def test_a_few_unusable_rows_hide_among_others(tmp_path: Path, absent: int) -> None:
    admission = Admission(tmp_path / "told.db")
    every, usable = numbers(range(60)), np.ones(60, bool)
    whole = admission.split("s", every, usable, MIN, draw)
    usable[1 : 1 + absent] = False
    part = admission.split("s", every, usable, MIN, draw)
    assert int((whole.train & ~part.train).sum()) == MIN
    assert not part.train[~usable].any()
    assert np.array_equal(part.held_out, whole.held_out)
    same = admission.split("s", every, usable, MIN, draw)
    assert np.array_equal(same.train, part.train)


def test_few_rows_that_another_target_adds_wait(tmp_path: Path) -> None:
    admission = Admission(tmp_path / "told.db")
    every, usable = numbers(range(60)), np.ones(60, bool)
    usable[:3] = False
    first = admission.split("s", every, usable, MIN, draw)
    later = admission.split("s", every, np.ones(60, bool), MIN, draw)
    assert np.array_equal(first.train, later.train)
    assert np.array_equal(first.held_out, later.held_out)
