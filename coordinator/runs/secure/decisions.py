"""Decides what a secure run does next while it makes a sum. Pure.

A step waits for all of its peers that are online. After `step_deadline_s` it continues with the
answers that are there, if these are enough; later the cohort is lost.
"""

from __future__ import annotations

from typing import NamedTuple

from coordinator.runs import steps
from coordinator.runs.state import Run
from coordinator.runs.steps import Step, count_peers
from protocols.messages.states import RunState
from protocols.messages.work import OpenSum
from protocols.privacy.secagg.cohort import MIN_COHORT

#: A step with small messages needs less. Masked updates may take as long as the run's deadline.
_MAX_STEP_S = 30.0
#: How often a round trains again because its cohort was lost.
MAX_LOST_COHORTS = 5
_WHAT = {"share": "peers have shared their keys", "mask": "masked updates", "agree": "shares"}


class Progress(NamedTuple):
    """The progress of a sum that is not in the ledger.

    `answered`: how many peers have answered this step, of `total`; it needs `needed`. `awaited`:
    online peers that have not. `absent`: peers that are offline and could still answer. `enough`:
    the step can end with what is here. `is_due`: it does not wait for online peers any more;
    `is_over`: nor for any other peer.
    """

    answered: int
    total: int
    needed: int
    awaited: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()
    enough: bool = False
    is_due: bool = False
    is_over: bool = False


def step_deadline_s(run: Run) -> float:
    """Seconds that a step waits for peers that are online."""
    return min(run.spec.deadline_s, _MAX_STEP_S)


def needs(run: Run) -> int:
    """The fewest peers of a sum."""
    return MIN_COHORT if run.state is RunState.EVALUATING else max(MIN_COHORT, run.spec.quorum)


def decide(run: Run, progress: Progress | None) -> Step:
    """The next step of a run with an open cohort, or that has all that a cohort needs."""
    cohort = run.cohort
    if cohort is None:
        if len(run.updates) >= needs(run):
            return steps.FixCohort()
        return lose(run, f"{count_peers(len(run.updates))} can take part; {needs(run)} are needed")
    if progress is None:
        return steps.Wait("the state of the sum")
    if progress.awaited and not progress.is_due:
        return steps.Wait(describe(run, progress), progress.awaited)
    if progress.enough:
        if not cohort.sharers:
            return steps.FixSharers()
        if not cohort.survivors:
            return steps.FixSurvivors()
        if cohort.kind == "evaluate":
            return steps.CloseRound()
        return steps.Aggregate(run.contributors)
    if progress.is_over or not (progress.awaited or progress.absent):
        refused = sorted(peer for peer, status in run.peers.items() if status == "refused")
        why = f"; {count_peers(len(refused))} refused: {run.last_refusal}" if refused else ""
        return lose(
            run,
            f"{progress.answered} of {progress.total} {_what(run)}, and a sum needs "
            f"{progress.needed}{why}",
        )
    return steps.Wait(describe(run, progress), progress.awaited)


def is_over_for(run: Run, peer: str, told: OpenSum) -> bool:
    """True if this peer is not asked for a step of this sum any more, also after a restart."""
    evaluates = run.state is RunState.EVALUATING
    is_open = evaluates or run.state in (RunState.TRAINING, RunState.AGGREGATING)
    now = (run.round, run.turn, "evaluate" if evaluates else "train")
    if not is_open or (told.round, told.turn, told.kind) != now:
        return True
    cohort = run.cohort
    return cohort is not None and peer not in (cohort.survivors or cohort.sharers or cohort.peers)


def lose(run: Run, because: str) -> Step:
    """Give the cohort up; after too many of them, the run."""
    if run.state is RunState.AGGREGATING and run.lost_cohorts >= MAX_LOST_COHORTS:
        return steps.EndRun(
            RunState.FAILED,
            f"{run.lost_cohorts + 1} cohorts of round {run.round} were lost, the last one because: "
            f"{because}; wait for more reliable peers, then: commonweight run resume {run.id}",
        )
    return steps.LoseCohort(because)


def describe(run: Run, progress: Progress) -> str:
    """How far the sum is, as text."""
    return f"secure: {progress.answered} of {progress.total} {_what(run)}, needs {progress.needed}"


def _what(run: Run) -> str:
    return _WHAT[run.cohort.step] if run.cohort else ""
