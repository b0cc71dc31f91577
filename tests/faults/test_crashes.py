"""A few of the real processes' cases: `make faults` plays them all."""

from __future__ import annotations

from pathlib import Path

from protocols import failpoints
from protocols.failpoints import NAMES
from tests.faults import crashes


def test_every_step_of_a_round_is_a_case() -> None:
    for seed in (1, 2, 3):
        points = [*crashes.coordinator_points(seed), *crashes.agent_points(seed)]
        played = {point.partition(":")[0] for point in points} | {"runs.recalled"}
        of_rounds = NAMES - set(failpoints.JOBS + failpoints.AGENT_JOBS)
        assert played == {name for name in of_rounds if not name.startswith("trainer.")}


def test_a_coordinator_killed_in_a_round_loses_nothing(tmp_path: Path) -> None:
    points = ("reply.taken:2", "version.renamed")
    assert crashes.coordinator(tmp_path, [1], points).violations == []


def test_an_agent_killed_with_its_claim_on_the_way_is_counted_once(tmp_path: Path) -> None:
    assert crashes.agent(tmp_path, [1], ("agent.claim.sending:2",)).violations == []
