"""Kills coordinator, agent and trainer at every step of a round; the result must not change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.faults import checker, failpoint_names
from benchmarks.faults.results import Row
from benchmarks.faults.site import Site, site
from tests.support.waiting import wait_for

PEERS = ("ada", "bob")
ROUNDS = 2
BACK_WITHIN_S = 10.0
#: Steps of one peer's work in one round (`site.TRAINING`).
STEPS = 5
#: A peer whose work failed gets work again after a deadline.
_SOON_S = 4.0
#: Reached only once in a run.
_ONCE = ("PeersAsked", "WeightsInitialised", "RunEnded", "runs.queued", "version.adopted")
#: Not reached in an evaluation; a peer may train only twice.
_TRAINING_ONLY = ("agent.outbox.cleared", "agent.upload.piece", "agent.upload.done")
#: Reached by every event; the first is the start of the run, which then never happened.
_LEDGER = "ledger.inserted"
#: Reached only at a start.
_AT_START = "runs.recalled"


def coordinator_points(seed: int) -> list[str]:
    """Every step of a round on the coordinator; the seed selects the round."""
    points = [point for point in failpoint_names.COORDINATOR if point not in (_AT_START, _LEDGER)]
    later = [p if p.endswith(_ONCE) or seed % 2 else f"{p}:2" for p in points]
    return [*later, *(f"{_LEDGER}:{nth}" for nth in range(2 + seed % 2, 12, 2))]


def agent_points(seed: int) -> list[str]:
    """Every step of a round on the agent; the seed selects the message."""
    nth = {1: 2, 2: 1}.get(seed, 3)
    return [f"{p}:{min(nth, 2) if p in _TRAINING_ONLY else nth}" for p in failpoint_names.AGENT]


# --- the coordinator -------------------------------------------------------------------------


def coordinator(folder: Path, seeds: Iterable[int], points: Sequence[str] = ()) -> Row:
    """SIGKILL and a restart at each point; the weights must be the same as without."""
    row = Row("1, 2 coordinator kill -9 at every step of a round", "versions lost; back within s")
    row.figure = "0 lost; {worst:.1f} s"
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        for seed in seeds:
            undisturbed = _weights(fleet, seed)
            for point in points or coordinator_points(seed):
                _coordinator_dies(fleet, row, seed, undisturbed, point)
            if not points:
                _coordinator_dies_again_at_start(fleet, row, seed, undisturbed)
    return row


def meeting(folder: Path, seeds: Iterable[int]) -> Row:
    """SIGKILL while peers agree on a schema before round 1; the weights must be the same."""
    row = Row("1, 2 coordinator kill -9 while peers compare themselves", "back within s")
    row.figure = "{worst:.1f} s"
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        for seed in seeds:
            undisturbed = _weights(fleet, seed)
            for point in failpoint_names.HANDSHAKE:
                _coordinator_dies(fleet, row, seed, undisturbed, point, handshake=True)
    return row


def _weights(fleet: Site, seed: int) -> list[str]:
    run = fleet.order(seed=seed, rounds=ROUNDS, quorum=len(PEERS))
    return checker.digests(fleet.outcome(run))


def _coordinator_dies(
    fleet: Site,
    row: Row,
    seed: int,
    undisturbed: list[str],
    point: str,
    *,
    handshake: bool = False,
) -> None:
    fleet.programs["up"].stop()
    fleet.rise(point)
    run = fleet.order(seed=seed, rounds=ROUNDS, quorum=len(PEERS), handshake=handshake)
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
    """After a restart the run continues and ends with the same result."""
    lines = len(checker.read_ledger(fleet.home))
    began = time.monotonic()
    fleet.rise()
    if not fleet.ended(run):
        wait_for(lambda: len(checker.read_ledger(fleet.home)) > lines, f"{point}: work continues")
    back_s = time.monotonic() - began
    facts = fleet.outcome(run)
    found = fleet.violations(PEERS)
    if checker.digests(facts) != undisturbed:
        found.append(f"{run} has other weights than without the fault")
    if back_s > BACK_WITHIN_S:
        found.append(f"{run} went on after {back_s:.1f} s")
    row.add(point, seed, found, back_s)


# --- agents and trainers ---------------------------------------------------------------------


def agent(folder: Path, seeds: Iterable[int], points: Sequence[str] = ()) -> Row:
    """SIGKILL and a start of one of two agents at each point; the weights must be the same."""
    row = Row("2, 3, 4 agent kill -9 at every step of a round", "steps repeated at most")
    _each_dies(folder, row, seeds, lambda seed: points or agent_points(seed), _agent_dies)
    return row


def trainer(folder: Path, seeds: Iterable[int], points: Sequence[str] = ()) -> Row:
    """SIGKILL of a trainer at each point; its agent survives and starts another trainer."""
    row = Row("33 trainer kill -9 at every step", "steps repeated at most")
    every = [
        f"{p}:{nth}" for p in failpoint_names.TRAINER for nth in ((1, 3) if "step" in p else (2,))
    ]
    _each_dies(folder, row, seeds, lambda seed: points or every, _trainer_dies)
    return row


def _each_dies(
    folder: Path,
    row: Row,
    seeds: Iterable[int],
    points_of: Callable[[int], Sequence[str]],
    dies: Callable[[Site, str], None],
) -> None:
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        for seed in seeds:
            undisturbed = _weights(fleet, seed)
            for point in points_of(seed):
                before = checker.read_truth(fleet.truth_file("ada")).repeated
                fleet.programs["ada"].stop()
                fleet.come_back("ada", f"{point}=kill@{fleet.folder / f'{point}-{seed}'}")
                run = fleet.order(seed=seed, rounds=ROUNDS, quorum=len(PEERS), deadline_s=_SOON_S)
                dies(fleet, f"{point}-{seed}")
                facts = fleet.outcome(run)
                found = fleet.violations(PEERS)
                if checker.digests(facts) != undisturbed:
                    found.append(f"{run} has other weights than without the fault")
                repeated = checker.read_truth(fleet.truth_file("ada")).repeated - before
                if repeated > STEPS:
                    found.append(f"{repeated} steps were done twice")
                row.add(point, seed, found, repeated)
    row.figure = f"{{worst:.0f}} of {STEPS}"


def _agent_dies(fleet: Site, marker: str) -> None:
    fleet.dead("ada")
    fleet.come_back("ada")


def _trainer_dies(fleet: Site, marker: str) -> None:
    wait_for((fleet.folder / marker).exists, f"the trainer died: {marker}")
    assert fleet.programs["ada"].process.poll() is None, "the agent died with its trainer"
