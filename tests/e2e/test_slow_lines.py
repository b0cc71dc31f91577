"""A large update over a slow line that is cut, and over a reboot, counts once."""

from __future__ import annotations

import pytest

from benchmarks.faults.slow_lines import REBOOTED, SLOW, Case, measured

pytestmark = pytest.mark.long


@pytest.mark.parametrize("mode", ["fold", "buffered"])
def test_updates_over_slow_lines_count_and_the_others_go_on(mode: str) -> None:
    found = measured(Case(mode, megabytes=16, mbit=20, train_s=3, updates=1, cut=0.1))
    assert found["versions"] >= 2
    for name in SLOW:
        row = found["peers"][name]
        assert row["updates"] >= 1
        assert row["killed"] is (name == REBOOTED)
        # A third of the bytes had left when one of them was killed.
        assert row["sent_twice"] < 0.25
    assert found["peers"][REBOOTED]["versions_behind"] >= 1
