"""A sleep of the machine is noticed from its clocks, and the links are made anew."""

from __future__ import annotations

import pytest

from agent.transport.suspend_watch import MIN_SUSPEND_S, Clocks, suspended_s

BEFORE = Clocks(1_000.0, 50.0)


@pytest.mark.parametrize(
    ("wall", "monotonic", "slept"),
    [
        (0.5, 0.5, 0.0),
        (3.0, 3.0, 0.0),  # a busy machine
        (3600.0, 0.6, 3599.5),  # a lid was closed
        (60.0, 60.0, 59.5),  # the process was frozen
        (-3600.0, 0.5, 0.0),  # the wall clock was put back
        (MIN_SUSPEND_S, 0.5, 0.0),
    ],
)
def test_a_sleep_is_told_from_either_clock(wall: float, monotonic: float, slept: float) -> None:
    after = Clocks(BEFORE.wall + wall, BEFORE.monotonic + monotonic)
    assert suspended_s(BEFORE, after, 0.5) == slept


def test_the_clocks_of_this_machine_agree_about_a_moment() -> None:
    assert suspended_s(Clocks.now(), Clocks.now(), 0.5) == 0.0
