"""Coordinator, agent and trainer die at every step of a round; the run ends as if none had."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from protocols import failpoints
from tests.e2e.fleet_harness import until
from tests.faults import checker
from tests.faults.results import Row
from tests.faults.site import Site, site

PEERS = ("ada", "bob")
ROUNDS = 2
BACK_WITHIN_S = 10.0
#: Reached once in a run, or only at its beginning or end: never a second time.
_ONCE = ("PeersAsked", "WeightsInitialised", "RunEnded", "runs.queued", "version.adopted")
#: Reached in a start only.
_AT_START = "runs.recalled"


def coordinator_points(seed: int) -> list[str]:
    """Every step of a round on the coordinator; the seed says in which round."""
    points = [point for point in failpoints.COORDINATOR if point != _AT_START]
    return [p if p.endswith(_ONCE) or seed % 2 else f"{p}:2" for p in points]


def agent_points(seed: int) -> list[str]:
    """Every step of a round on the agent; the seed says in which round."""
    return [point if seed % 2 else f"{point}:2" for point in failpoints.AGENT]


# --- the coordinator -------------------------------------------------------------------------


def coordinator(folder: Path, seeds: Iterable[int], points: Sequence[str] = ()) -> Row:
    """SIGKILL at each point, a restart, the same weights as without."""
    row = Row("1, 2 coordinator kill -9 at every step of a round", "versions lost; back within s")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        for seed in seeds:
            undisturbed = _weights(fleet, seed)
            for point in points or coordinator_points(seed):
                _coordinator_dies(fleet, row, seed, undisturbed, point)
            if not points:
                _coordinator_dies_again_at_start(fleet, row, seed, undisturbed)
    row.figure = f"0 lost; {row.worst:.1f} s" if not row.violations else "see violations"
    return row


def _weights(fleet: Site, seed: int) -> list[str]:
    run = fleet.order(seed=seed, rounds=ROUNDS, quorum=len(PEERS))
    return checker.digests(fleet.outcome(run))


def _coordinator_dies(
    fleet: Site, row: Row, seed: int, undisturbed: list[str], point: str
) -> None:
    fleet.programs["up"].stop()
    fleet.rise(point)
    run = fleet.order(seed=seed, rounds=ROUNDS, quorum=len(PEERS))
    fleet.dead("up")
    _goes_on(fleet, row, seed, undisturbed, point, run)


def _coordinator_dies_again_at_start(
    fleet: Site, row: Row, seed: int, undisturbed: list[str]
) -> None:
    fleet.programs["up"].stop()
    fleet.rise("run.recorded.RoundOpened")
    run = fleet.order(seed=seed, rounds=ROUNDS, quorum=len(PEERS))
    fleet.dead("up")
    fleet.rise_and_fall(_AT_START)
    _goes_on(fleet, row, seed, undisturbed, f"{_AT_START} after a kill", run)


def _goes_on(
    fleet: Site, row: Row, seed: int, undisturbed: list[str], point: str, run: str
) -> None:
    """After a restart the run goes on and ends as it would have."""
    lines = len(checker.read_ledger(fleet.home))
    began = time.monotonic()
    fleet.rise()
    over = checker.ended(fleet.facts()[run])
    if not over:
        until(lambda: len(checker.read_ledger(fleet.home)) > lines, f"{point}: work goes on")
    back_s = time.monotonic() - began
    facts = fleet.outcome(run)
    found = fleet.violations(PEERS)
    if checker.digests(facts) != undisturbed:
        found.append(f"{run} has other weights than without the fault")
    if back_s > BACK_WITHIN_S:
        found.append(f"{run} went on after {back_s:.1f} s")
    row.add(point, seed, found, back_s)
