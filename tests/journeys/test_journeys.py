"""A short fixed set of journeys; `make journeys` plays more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.journeys import invariants
from tests.journeys.fleet import JourneyFleet
from tests.journeys.machine import Coverage, Violation, run_sequence

SEED, STEPS = 7, 12


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_whatever_users_do_one_after_another_the_fleet_keeps_its_promises(
    tmp_path: Path, number: int
) -> None:
    coverage, steps = Coverage(), list[str]()
    for earlier in range(number):
        run_sequence(SEED + earlier, STEPS, coverage)
    fleet = JourneyFleet(tmp_path)
    try:
        run_sequence(SEED + number, STEPS, coverage, lambda: fleet, say=steps.append)
    except Violation as err:
        pytest.fail("\n".join([*steps, str(err)]))
    assert coverage.steps == STEPS
    assert list(invariants.at_end(fleet)) == []


def test_a_sequence_is_the_same_each_time() -> None:
    first, second = Coverage(), Coverage()
    run_sequence(SEED, 30, first)
    run_sequence(SEED, 30, second)
    assert first.planned == second.planned
    assert len(first.planned) > 25
    run_sequence(SEED, 30, first)
    assert len(first.planned) > 50
