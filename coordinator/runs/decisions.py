"""What a run does next, from where it stands and who is there. Pure.

Doing a step gives new facts; a step is never repeated because of what it was, only because the run
still stands where it stood.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

from coordinator.runs import best_version, buffered, recovery
from coordinator.runs.recovery import KeepOwn, Seek
from coordinator.runs.state import Run
from coordinator.storage.run_events import WorkGiven
from protocols.errors import OF_SETTINGS
from protocols.messages.states import RunState


class View(NamedTuple):
    """What the run cannot know: the peers that could work now, and whether time is up."""

    eligible: frozenset[str]
    due: bool = False


class Agree(NamedTuple):
    """Find what the peers that described themselves have alike."""


class AskInit(NamedTuple):
    """Ask one peer for the first weights."""

    peer: str


class OpenRound(NamedTuple):
    round: int
    base: str
    eligible: tuple[str, ...]


class AskMore(NamedTuple):
    """Give the open round's work to these peers too."""

    peers: tuple[str, ...]


class GiveWork(NamedTuple):
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
    Agree
    | AskInit
    | Seek
    | KeepOwn
    | OpenRound
    | AskMore
    | GiveWork
    | CloseTraining
    | Aggregate
    | OpenEvaluation
    | CloseRound
    | EndRun
    | Wait
)


#: Begins what an agent tells that cannot work with the run's settings.
_OF_SETTINGS = tuple(f"agent failed: {code}: " for code in sorted(OF_SETTINGS))
#: So many peers that are waited for are named.
_NAMED = 4
#: An automatic deadline is so many times what the slowest peer needed, but no less than that.
_TIMES_THE_SLOWEST = 2.0
_LEAST_DEADLINE_S = 5.0


def deadline_s(run: Run) -> float:
    """Seconds that a phase of this round may take before it goes on with the quorum."""
    if run.recalling:
        return min(run.spec.deadline_s, recovery.WITHIN_S)
    longest = [max(run.needed[peer]) for peer in run.peers if peer in run.needed]
    if run.spec.deadline == "fixed" or len(longest) < len(run.peers) or not longest:
        return run.spec.deadline_s  # nobody knows yet how long a peer takes that is new
    return min(run.spec.deadline_s, max(_LEAST_DEADLINE_S, _TIMES_THE_SLOWEST * max(longest)))


def selected(run: Run, number: int, eligible: Iterable[str], count: int = 0) -> tuple[str, ...]:
    """Those of `eligible` to be asked in round `number`, in name order; by chance, from the seed.

    All of them unless the run selects. `count`: so many, in place of the run's own number.
    """
    if not run.spec.select:
        return tuple(sorted(eligible))
    count = count or math.ceil(run.spec.select * run.spec.quorum)

    def lot(peer: str) -> bytes:
        return hashlib.sha256(f"{run.spec.seed} {number} {peer}".encode()).digest()

    return tuple(sorted(sorted(eligible, key=lot)[:count]))


def decide(run: Run, view: View) -> Step:
    """The next step of a run that has not ended."""
    view = view._replace(eligible=view.eligible - run.excluded)
    if run.buffered and run.state in (RunState.TRAINING, RunState.EVALUATING):
        return _decide_buffered(run, view)
    match run.state:
        case RunState.WAITING:
            return _decide_waiting(run, view)
        case RunState.TRAINING:
            return _decide_training(run, view)
        case RunState.AGGREGATING:
            return Aggregate(run.contributors)
        case RunState.EVALUATING:
            return _decide_evaluating(run, view)
        case _:
            return Wait(f"the run has {run.state}")


def _decide_waiting(run: Run, view: View) -> Step:
    if run.recalling:
        return _decide_recalling(run, view)
    if _errand_is_done(run):
        return EndRun(RunState.FINISHED, f"it was for {run.spec.only} only")
    if run.round >= run.spec.rounds and run.spec.only != "evaluate":
        return EndRun(RunState.FINISHED, f"all {run.spec.rounds} rounds are done")
    if (end := _enough(run)) is not None:
        return end
    if run.describing:
        return _decide_describing(run, view)
    if not run.head:
        return _decide_init(run, view)
    if len(view.eligible) < run.spec.quorum:
        return Wait(f"{_peers(run.spec.quorum - len(view.eligible))} more for the quorum")
    if run.spec.only == "evaluate":
        return OpenEvaluation(tuple(sorted(view.eligible)))
    return OpenRound(run.round + 1, run.head, tuple(sorted(view.eligible)))


def _errand_is_done(run: Run) -> bool:
    """True if the one part of a run that was asked for is there."""
    done = {"describe": run.card is not None, "init": bool(run.head)}
    return bool(run.spec.only) and done.get(run.spec.only, bool(run.history))


def _enough(run: Run) -> EndRun | None:
    """The end of a run that has learnt enough, or that cannot know whether it has."""
    spec, best = run.spec, run.best
    last = run.history[-1] if run.history else None
    if last is None or best is None or not last.metrics:
        return None
    name = best_version.metric_of(spec, last.metrics)
    if not name and (spec.best_metric or spec.patience or spec.target is not None):
        wanted = spec.best_metric or " or ".join(best_version.USUAL)
        told = ", ".join(sorted(last.metrics))
        return EndRun(RunState.FAILED, f"no peer tells the metric {wanted}; they tell: {told}")
    if best_version.is_reached(spec, best.metrics):
        value = best.metrics[name]
        return EndRun(RunState.FINISHED, f"{name} is {value:.4g} in round {best.round}")
    if spec.patience and run.round - best.round >= spec.patience:
        since = f"no better {name} in {spec.patience} rounds; best is round {best.round}"
        return EndRun(RunState.FINISHED, since)
    return None


def _decide_recalling(run: Run, view: View) -> Step:
    match recovery.decide(run, view.eligible, view.due):
        case recovery.Ask(peers):
            return AskMore(peers)
        case recovery.Seek(version):
            return Seek(version)
        case recovery.KeepOwn():
            return KeepOwn()
        case recovery.GiveUp():
            return EndRun(RunState.FINISHED, f"{run.ended_because}; its versions are lost")
        case str(what):
            return Wait(what)


def _decide_describing(run: Run, view: View) -> Step:
    """Everybody who is here is asked at once; who comes later compares by itself."""
    told = len(run.described)
    if not run.peers and len(view.eligible) < run.spec.quorum:
        return Wait(f"{_peers(run.spec.quorum - len(view.eligible))} more for the quorum")
    again = {p for p in view.eligible if run.peers.get(p, "lost") == "lost"}
    if again:
        return AskMore(tuple(sorted(again)))
    if run.pending and not view.due:
        return Wait(f"what {_peers(len(run.pending))} tell of data and model")
    if told >= run.spec.quorum:
        return Agree()
    if run.pending and (silent := view.eligible.intersection(run.pending)):
        return AskMore(tuple(sorted(silent)))  # the deadline has passed: it may have been lost
    if not told and run.last_refusal:
        return EndRun(RunState.FAILED, f"no peer's data and model fit: {run.last_refusal}")
    because = f" ({run.last_refusal})" if run.last_refusal else ""
    return Wait(f"{_peers(run.spec.quorum - told)} more whose data and model fit{because}")


def _decide_init(run: Run, view: View) -> Step:
    refused = _refused(run)
    if view.eligible and view.eligible <= refused and not run.pending:
        # Nobody who is here can do it, and asking again gives the same answer.
        return EndRun(RunState.FAILED, f"nobody could make the first weights: {run.last_refusal}")
    if view.due and view.eligible:
        return AskMore(tuple(sorted(view.eligible)))
    if run.pending:
        return Wait(f"the first weights from {run.pending[0]}")
    untried = sorted(view.eligible - refused)
    return AskInit(untried[0]) if untried else Wait("a peer that can make the first weights")


def _decide_training(run: Run, view: View) -> Step:
    answered = len(run.updates)
    waits_for_all = not run.spec.select
    if answered >= run.spec.quorum and (view.due or not (waits_for_all and run.pending)):
        late = {accepted.peer for accepted in run.buffer}
        return CloseTraining(tuple(sorted(run.updates.keys() | late)))
    back = {p for p, standing in run.peers.items() if standing == "lost"} & view.eligible
    if back:
        return AskMore(tuple(sorted(back)))
    if view.due and (others := view.eligible - run.updates.keys()):
        # The new, those that failed, and those that were asked: the question may have been lost.
        return AskMore(tuple(sorted(others)))
    if (end := _cannot_begin(run, view)) is not None:
        return end
    if answered + len(run.pending) < run.spec.quorum:
        new = view.eligible - run.peers.keys()
        missing = run.spec.quorum - answered - len(run.pending)
        if new:
            return AskMore(selected(run, run.round, new, math.ceil(run.spec.select * missing)))
        return Wait(f"{_peers(missing)} more for the quorum")
    if view.due:
        return Wait(f"the quorum: {answered} of {run.spec.quorum}; the deadline has passed")
    return Wait(f"updates of {_who(run.pending)}")


def _cannot_begin(run: Run, view: View) -> EndRun | None:
    """The end of a run whose settings nobody who is here can train with, from its first round on:
    asking again gives the same answer. What was trained for rounds does not end by this."""
    refused = _refused(run)
    nobody = not (run.history or run.updates or run.pending) and view.eligible <= refused
    if nobody and refused and run.last_refusal.startswith(_OF_SETTINGS):
        return EndRun(RunState.FAILED, f"nobody could train: {run.last_refusal}")
    return None


def _refused(run: Run) -> set[str]:
    return {peer for peer, standing in run.peers.items() if standing == "refused"}


def _decide_buffered(run: Run, view: View) -> Step:
    evaluating = run.state is RunState.EVALUATING
    if evaluating and not run.evaluating:
        eligible = tuple(sorted(view.eligible))
        return OpenEvaluation(eligible) if eligible else Wait("a peer")
    if buffered.is_over(run):
        left = view.eligible.intersection(run.pending) - run.given.keys()
        if view.due or not left:
            return CloseRound()
        return Wait(f"the evaluation by {_peers(len(left))}")
    if buffered.is_full(run):
        contributors = tuple(one.peer for one in buffered.in_order(run))
        return CloseRound() if evaluating else CloseTraining(contributors)
    if given := buffered.work_for(run, view.eligible, view.due):
        return GiveWork(given)
    missing = run.spec.buffer - len(run.buffer)
    behind = max((buffered.staleness(run, given) for given in run.given.values()), default=0)
    at_work = f"{_peers(len(run.given))} at work, at most {behind} versions behind"
    return Wait(f"{missing} of {run.spec.buffer} updates; {at_work}")


def _decide_evaluating(run: Run, view: View) -> Step:
    if not run.evaluating:
        if run.spec.only == "train":
            return CloseRound()
        return OpenEvaluation(tuple(sorted(view.eligible))) if view.eligible else CloseRound()
    enough = run.spec.select and len(run.updates) >= run.spec.quorum
    if view.due or not run.pending or enough:
        return CloseRound()
    return Wait(f"the evaluation by {_who(run.pending)}")


def _who(peers: tuple[str, ...]) -> str:
    """How many, and which while they are few; whoever shows it puts names for ids."""
    few = f" ({', '.join(peers)})" if 0 < len(peers) <= _NAMED else ""
    return _peers(len(peers)) + few


def _peers(count: int) -> str:
    return f"{count} peer" + ("s" if count != 1 else "")
