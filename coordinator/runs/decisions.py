"""What a run does next, from where it stands and who is there. Pure.

Doing a step gives new events; a step is never repeated because of what it was, only because the run
still stands where it stood.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

from coordinator.runs import best_version, buffered, recovery
from coordinator.runs.recovery import FetchVersion, KeepOwn
from coordinator.runs.state import Run
from coordinator.storage.run_events import WorkGiven
from protocols.errors import SETTINGS_CODES
from protocols.messages.states import RunState


class Observation(NamedTuple):
    """What the run cannot know: the peers that could work now, and whether time is up."""

    eligible: frozenset[str]
    deadline_passed: bool = False


class AgreeSchema(NamedTuple):
    """Find what the peers that described themselves have alike."""


class AskInit(NamedTuple):
    """Ask one peer for the first weights."""

    peer: str


class OpenRound(NamedTuple):
    round: int
    base: str
    eligible: tuple[str, ...]


class AskPeers(NamedTuple):
    """Give the open round's work to these peers too."""

    peers: tuple[str, ...]


class AssignWork(NamedTuple):
    """Buffered: give each of these peers training of its own."""

    given: tuple[WorkGiven, ...]


class CloseTraining(NamedTuple):
    contributors: tuple[str, ...]


class Aggregate(NamedTuple):
    contributors: tuple[str, ...]


class OpenEvaluation(NamedTuple):
    eligible: tuple[str, ...]


class CloseRound(NamedTuple):
    pass


class EndRun(NamedTuple):
    state: RunState
    because: str


class Wait(NamedTuple):
    """Nothing to do until something changes; `what` is for a person, but for the peers' ids."""

    what: str


Step = (
    AgreeSchema
    | AskInit
    | FetchVersion
    | KeepOwn
    | OpenRound
    | AskPeers
    | AssignWork
    | CloseTraining
    | Aggregate
    | OpenEvaluation
    | CloseRound
    | EndRun
    | Wait
)


#: Begins what an agent tells that cannot work with the run's settings.
_SETTINGS_REFUSALS = tuple(f"agent failed: {code}: " for code in sorted(SETTINGS_CODES))
#: So many peers that are waited for are named.
_MAX_NAMED_PEERS = 4
#: An automatic deadline is so many times what the slowest peer needed, but no less than that.
_SLOWEST_FACTOR = 2.0
_MIN_DEADLINE_S = 5.0


def phase_deadline_s(run: Run) -> float:
    """Seconds that a phase of this round may take before it goes on with the quorum."""
    if run.recalling:
        return min(run.spec.deadline_s, recovery.LISTEN_S)
    longest = [
        max(run.training_seconds[peer]) for peer in run.peers if peer in run.training_seconds
    ]
    if run.spec.deadline == "fixed" or len(longest) < len(run.peers) or not longest:
        return run.spec.deadline_s  # nobody knows yet how long a peer takes that is new
    return min(run.spec.deadline_s, max(_MIN_DEADLINE_S, _SLOWEST_FACTOR * max(longest)))


def select_peers(run: Run, number: int, eligible: Iterable[str], count: int = 0) -> tuple[str, ...]:
    """Those of `eligible` to be asked in round `number`, in name order; by chance, from the seed.

    All of them unless the run selects. `count`: so many, in place of the run's own number.
    """
    if not run.spec.select:
        return tuple(sorted(eligible))
    count = count or math.ceil(run.spec.select * run.spec.quorum)

    def lot(peer: str) -> bytes:
        return hashlib.sha256(f"{run.spec.seed} {number} {peer}".encode()).digest()

    return tuple(sorted(sorted(eligible, key=lot)[:count]))


def decide(run: Run, observed: Observation) -> Step:
    """The next step of a run that has not ended."""
    observed = observed._replace(eligible=observed.eligible - run.excluded)
    if run.buffered and run.state in (RunState.TRAINING, RunState.EVALUATING):
        return _decide_buffered(run, observed)
    match run.state:
        case RunState.WAITING:
            return _decide_waiting(run, observed)
        case RunState.TRAINING:
            return _decide_training(run, observed)
        case RunState.AGGREGATING:
            return Aggregate(run.contributors)
        case RunState.EVALUATING:
            return _decide_evaluating(run, observed)
        case _:
            return Wait(f"the run has {run.state}")


def _decide_waiting(run: Run, observed: Observation) -> Step:
    if run.recalling:
        return _decide_recalling(run, observed)
    if _only_part_is_done(run):
        return EndRun(RunState.FINISHED, f"it was for {run.spec.only} only")
    if run.round >= run.spec.rounds and run.spec.only != "evaluate":
        return EndRun(RunState.FINISHED, f"all {run.spec.rounds} rounds are done")
    if (end := _early_stop(run)) is not None:
        return end
    if run.describing:
        return _decide_describing(run, observed)
    if not run.head:
        return _decide_init(run, observed)
    if len(observed.eligible) < run.spec.quorum:
        return Wait(f"{_peers(run.spec.quorum - len(observed.eligible))} more for the quorum")
    if run.spec.only == "evaluate":
        return OpenEvaluation(tuple(sorted(observed.eligible)))
    return OpenRound(run.round + 1, run.head, tuple(sorted(observed.eligible)))


def _only_part_is_done(run: Run) -> bool:
    """True if the one part of a run that was asked for is there."""
    done = {"describe": run.card is not None, "init": bool(run.head)}
    return bool(run.spec.only) and done.get(run.spec.only, bool(run.history))


def _early_stop(run: Run) -> EndRun | None:
    """The end of a run that has learnt enough, or that cannot know whether it has."""
    spec, best = run.spec, run.best
    last = run.history[-1] if run.history else None
    if last is None or best is None or not last.metrics:
        return None
    name = best_version.metric_of(spec, last.metrics)
    if not name and (spec.best_metric or spec.patience or spec.target is not None):
        wanted = spec.best_metric or " or ".join(best_version.DEFAULT_METRICS)
        told = ", ".join(sorted(last.metrics))
        return EndRun(RunState.FAILED, f"no peer tells the metric {wanted}; they tell: {told}")
    if best_version.reaches_target(spec, best.metrics):
        value = best.metrics[name]
        return EndRun(RunState.FINISHED, f"{name} is {value:.4g} in round {best.round}")
    if spec.patience and run.round - best.round >= spec.patience:
        since = f"no better {name} in {spec.patience} rounds; best is round {best.round}"
        return EndRun(RunState.FINISHED, since)
    return None


def _decide_recalling(run: Run, observed: Observation) -> Step:
    match recovery.decide(run, observed.eligible, observed.deadline_passed):
        case recovery.Ask(peers):
            return AskPeers(peers)
        case recovery.FetchVersion(version):
            return FetchVersion(version)
        case recovery.KeepOwn():
            return KeepOwn()
        case recovery.GiveUp():
            return EndRun(RunState.FINISHED, f"{run.ended_because}; its versions are lost")
        case str(what):
            return Wait(what)


def _decide_describing(run: Run, observed: Observation) -> Step:
    """Everybody who is here is asked at once; who comes later compares by itself."""
    told = len(run.described)
    if not run.peers and len(observed.eligible) < run.spec.quorum:
        return Wait(f"{_peers(run.spec.quorum - len(observed.eligible))} more for the quorum")
    again = {p for p in observed.eligible if run.peers.get(p, "lost") == "lost"}
    if again:
        return AskPeers(tuple(sorted(again)))
    if run.pending and not observed.deadline_passed:
        return Wait(f"what {_peers(len(run.pending))} tell of data and model")
    if told >= run.spec.quorum:
        return AgreeSchema()
    if run.pending and (silent := observed.eligible.intersection(run.pending)):
        return AskPeers(tuple(sorted(silent)))  # the deadline has passed: it may have been lost
    if not told and run.last_refusal:
        return EndRun(RunState.FAILED, f"no peer's data and model fit: {run.last_refusal}")
    because = f" ({run.last_refusal})" if run.last_refusal else ""
    return Wait(f"{_peers(run.spec.quorum - told)} more whose data and model fit{because}")


def _decide_init(run: Run, observed: Observation) -> Step:
    refused = _refused(run)
    if observed.eligible and observed.eligible <= refused and not run.pending:
        # Nobody who is here can do it, and asking again gives the same answer.
        return EndRun(RunState.FAILED, f"nobody could make the first weights: {run.last_refusal}")
    if observed.deadline_passed and observed.eligible:
        return AskPeers(tuple(sorted(observed.eligible)))
    if run.pending:
        return Wait(f"the first weights from {run.pending[0]}")
    untried = sorted(observed.eligible - refused)
    return AskInit(untried[0]) if untried else Wait("a peer that can make the first weights")


def _decide_training(run: Run, observed: Observation) -> Step:
    answered = len(run.updates)
    waits_for_all = not run.spec.select
    if answered >= run.spec.quorum and (
        observed.deadline_passed or not (waits_for_all and run.pending)
    ):
        late = {accepted.peer for accepted in run.buffer}
        return CloseTraining(tuple(sorted(run.updates.keys() | late)))
    back = {p for p, standing in run.peers.items() if standing == "lost"} & observed.eligible
    if back:
        return AskPeers(tuple(sorted(back)))
    if observed.deadline_passed and (others := observed.eligible - run.updates.keys()):
        # The new, those that failed, and those that were asked: the question may have been lost.
        return AskPeers(tuple(sorted(others)))
    if (end := _cannot_begin(run, observed)) is not None:
        return end
    if answered + len(run.pending) < run.spec.quorum:
        new = observed.eligible - run.peers.keys()
        missing = run.spec.quorum - answered - len(run.pending)
        if new:
            return AskPeers(select_peers(run, run.round, new, math.ceil(run.spec.select * missing)))
        return Wait(f"{_peers(missing)} more for the quorum")
    if observed.deadline_passed:
        return Wait(f"the quorum: {answered} of {run.spec.quorum}; the deadline has passed")
    return Wait(f"updates of {_who(run.pending)}")


def _cannot_begin(run: Run, observed: Observation) -> EndRun | None:
    """The end of a run whose settings nobody who is here can train with, from its first round on:
    asking again gives the same answer. What was trained for rounds does not end by this."""
    refused = _refused(run)
    nobody = not (run.history or run.updates or run.pending) and observed.eligible <= refused
    if nobody and refused and run.last_refusal.startswith(_SETTINGS_REFUSALS):
        return EndRun(RunState.FAILED, f"nobody could train: {run.last_refusal}")
    return None


def _refused(run: Run) -> set[str]:
    return {peer for peer, standing in run.peers.items() if standing == "refused"}


def _decide_buffered(run: Run, observed: Observation) -> Step:
    evaluating = run.state is RunState.EVALUATING
    if evaluating and not run.evaluating:
        eligible = tuple(sorted(observed.eligible))
        return OpenEvaluation(eligible) if eligible else Wait("a peer")
    if buffered.is_over(run):
        left = observed.eligible.intersection(run.pending) - run.assignments.keys()
        if observed.deadline_passed or not left:
            return CloseRound()
        return Wait(f"the evaluation by {_peers(len(left))}")
    if buffered.is_full(run):
        contributors = tuple(one.peer for one in buffered.in_order(run))
        return CloseRound() if evaluating else CloseTraining(contributors)
    if given := buffered.work_for(run, observed.eligible, observed.deadline_passed):
        return AssignWork(given)
    missing = run.spec.buffer - len(run.buffer)
    behind = max((buffered.staleness(run, given) for given in run.assignments.values()), default=0)
    at_work = f"{_peers(len(run.assignments))} at work, at most {behind} versions behind"
    return Wait(f"{missing} of {run.spec.buffer} updates; {at_work}")


def _decide_evaluating(run: Run, observed: Observation) -> Step:
    if not run.evaluating:
        if run.spec.only == "train":
            return CloseRound()
        return (
            OpenEvaluation(tuple(sorted(observed.eligible))) if observed.eligible else CloseRound()
        )
    enough = run.spec.select and len(run.updates) >= run.spec.quorum
    if observed.deadline_passed or not run.pending or enough:
        return CloseRound()
    return Wait(f"the evaluation by {_who(run.pending)}")


def _who(peers: tuple[str, ...]) -> str:
    """How many, and which while they are few; whoever shows it puts names for ids."""
    few = f" ({', '.join(peers)})" if 0 < len(peers) <= _MAX_NAMED_PEERS else ""
    return _peers(len(peers)) + few


def _peers(count: int) -> str:
    return f"{count} peer" + ("s" if count != 1 else "")
