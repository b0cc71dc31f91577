"""Decides what a run does next, from its state and from who is online. Pure.

Carrying out a step produces new events. A step repeats only if the run's state still requires it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Set
from typing import NamedTuple

from coordinator.runs import buffered, candidates, ends, model_choice, recovery, steps
from coordinator.runs.secure import decisions as secure
from coordinator.runs.secure.decisions import Progress
from coordinator.runs.state import PeerStatus, Run
from coordinator.runs.steps import Step, count_peers
from protocols.errors import (
    AWAITED,
    SETTINGS_CODES,
    UNDECIDED_CODES,
    NotAllowed,
    UploadRefused,
)
from protocols.messages import refusals
from protocols.messages.states import RunState


class Observation(NamedTuple):
    """Observations that are not in the run's state: the peers that could work now, and whether time
    is up.

    `unfit`: peers that are online but refuse this run until their owners change something.
    `absent`: peers of the fleet that are not online or cannot work now. `sum`: how far the open
    cohort of a secure run is.
    """

    eligible: frozenset[str]
    deadline_passed: bool = False
    unfit: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    sum: Progress | None = None


#: Kinds of refusals that a peer cannot resolve: the run's settings do not fit, or its owner does
#: not allow them.
_LASTING_KINDS = SETTINGS_CODES | {UploadRefused.code, NotAllowed.code}
#: An automatic deadline is this multiple of the slowest peer's time, but at least the minimum.
_SLOWEST_FACTOR = 2.0
_MIN_DEADLINE_S = 5.0


def phase_deadline_s(run: Run) -> float:
    """Seconds that a phase of this round may take before it continues with the quorum."""
    if run.recalling:
        return min(run.spec.deadline_s, recovery.LISTEN_S)
    if run.cohort is not None:
        return secure.step_deadline_s(run)
    if run.comparing:
        return min(run.spec.deadline_s, model_choice.DEADLINE_S)
    longest = [max(run.training_seconds.get(peer, (math.inf,))) for peer in run.peers]
    slowest = max(longest, default=math.inf)
    if run.spec.deadline == "fixed" or math.isinf(slowest):  # the time of a new peer is unknown
        return run.spec.deadline_s
    return min(run.spec.deadline_s, max(_MIN_DEADLINE_S, _SLOWEST_FACTOR * slowest))


def select_peers(run: Run, number: int, eligible: Iterable[str], count: int = 0) -> tuple[str, ...]:
    """The peers to ask in round `number`, sorted: a random sample seeded by the run, or all.

    `count`: the size of the sample, if not the run's own.
    """
    if not run.spec.select:
        return tuple(sorted(eligible))
    count = count or math.ceil(run.spec.select * run.spec.quorum)

    def random_key(peer: str) -> bytes:
        return hashlib.sha256(f"{run.spec.seed} {number} {peer}".encode()).digest()

    return tuple(sorted(sorted(eligible, key=random_key)[:count]))


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
            if run.spec.secure:
                return secure.decide(run, observed.sum)
            return steps.Aggregate(run.contributors)
        case RunState.EVALUATING:
            return _decide_evaluating(run, observed)
        case _:
            return steps.Wait(f"the run has {run.state}")


def _decide_waiting(run: Run, observed: Observation) -> Step:
    spec = run.spec
    if run.recalling:
        return recovery.decide(run, observed.eligible, observed.deadline_passed)
    if (end := ends.of_run(run)) is not None:
        return end
    if (end := ends.of_model(run)) is not None:
        return candidates.after(run, end)
    if run.describing:
        return _or_next_model(run, _decide_describing(run, observed))
    if not run.head:
        return _or_next_model(run, _decide_init(run, observed))
    eligible = tuple(sorted(observed.eligible))
    if len(eligible) < spec.quorum:
        return _wait_for_quorum(run, observed, spec.quorum - len(eligible))
    if spec.only == "evaluate":
        return steps.OpenEvaluation(eligible)
    return steps.OpenRound(run.round + 1, run.head, eligible)


def _or_next_model(run: Run, step: Step) -> Step:
    """The next model in place of the end of a run whose peers cannot train the present one."""
    return candidates.after(run, step) if isinstance(step, steps.EndRun) else step


def _wait_for_quorum(run: Run, observed: Observation, missing: int) -> steps.Wait:
    """The wait for this many more peers, or for the decisions of their owners."""
    more = f"{missing} more peer{'s' if missing != 1 else ''} for the quorum"
    if not (awaiting := _await_consent(run, observed)):
        return steps.Wait(more)
    lacks = Counter(AWAITED[run.refusal_kinds[peer]] for peer in awaiting)
    texts = [] if len(awaiting) >= missing else [more]
    if consents := lacks["consent"] + lacks["review"] + lacks["decision"]:
        texts.append(f"the consent of {count_peers(consents)} to the task {run.spec.task}")
    if columns := lacks["columns"]:
        texts.append(f"the columns of {count_peers(columns)} for the task {run.spec.task}")
    if trusts := lacks["trust"]:
        texts.append(f"{count_peers(trusts)} whose owners trust enough others")
    return steps.Wait(", and ".join(texts), awaiting)


def _await_consent(run: Run, observed: Observation) -> tuple[str, ...]:
    """Online peers whose owners have not decided about the task yet, sorted."""
    kinds = run.refusal_kinds
    return tuple(sorted(p for p in observed.unfit if kinds.get(p) in UNDECIDED_CODES))


def _may_be_decided(run: Run, observed: Observation) -> bool:
    """True if the owner of a peer that refused has not decided yet, or has decided while the peer
    is away, for example to restart."""
    refused = _with_status(run, "refused") | _with_status(run, "lost") | observed.unfit
    return any(run.refusal_kinds.get(peer) in UNDECIDED_CODES for peer in refused)


def _decided(run: Run, eligible: Set[str]) -> set[str]:
    """Peers that lacked consent when they were asked, and whose owners have decided since."""
    kinds = run.refusal_kinds
    refused = _with_status(run, "refused") | run.cooling_down
    return {p for p in refused & eligible if kinds.get(p) in UNDECIDED_CODES}


def _decide_describing(run: Run, observed: Observation) -> Step:
    """All present peers are asked at once. Peers that come later compare the schema themselves."""
    eligible, quorum, num_described = observed.eligible, run.spec.quorum, len(run.described)
    if not run.peers and len(eligible) < quorum:
        return _wait_for_quorum(run, observed, quorum - len(eligible))
    decided = _decided(run, eligible)
    if run.comparing:
        wait = _wait_for_quorum(run, observed, quorum) if _await_consent(run, observed) else None
        return model_choice.decide(run, eligible, decided, observed.deadline_passed, wait)
    to_ask = {p for p in eligible if run.peers.get(p, "lost") == "lost"} | decided
    if to_ask:
        return steps.AskPeers(tuple(sorted(to_ask)))
    if run.pending and not observed.deadline_passed:
        return steps.Wait(f"the descriptions of data and model by {count_peers(len(run.pending))}")
    if num_described >= quorum:
        return steps.AgreeSchema()
    if silent := eligible.intersection(run.pending):
        return steps.AskPeers(tuple(sorted(silent)))  # the request may have been lost
    may_change = bool(_worth_another_try(run)) or _may_be_decided(run, observed)
    # A further model is left out if some refuse it, and the others are not there in time.
    refused = bool(_with_status(run, "refused") if run.trained else run.last_refusal)
    waits = num_described and observed.absent and not (run.trained and observed.deadline_passed)
    if refused and not may_change and not waits:
        who = f"only {count_peers(num_described)}" if num_described else "no peer"
        return steps.EndRun(RunState.FAILED, f"{who} can take part: {run.last_refusal}")
    if observed.deadline_passed and (others := eligible & _worth_another_try(run)):
        return steps.AskPeers(tuple(sorted(others)), opens_phase=True)
    if _await_consent(run, observed):
        return _wait_for_quorum(run, observed, quorum - num_described)
    because = f" ({run.last_refusal})" if run.last_refusal else ""
    missing = count_peers(quorum - num_described)
    return steps.Wait(f"{missing} more whose data and model fit{because}")


def _worth_another_try(run: Run) -> set[str]:
    """Peers whose last refusal may have passed, such as that of a trainer that was killed."""
    kinds = run.refusal_kinds
    return {p for p in _with_status(run, "refused") if kinds.get(p) in refusals.TRANSIENT}


def _decide_init(run: Run, observed: Observation) -> Step:
    eligible, refused = observed.eligible, _with_status(run, "refused")
    refused -= _decided(run, eligible)
    online = eligible | observed.unfit
    if online and not _may_be_decided(run, observed) and online <= refused and not run.pending:
        # No present peer can do it, and asking again would give the same answer.
        because = f"no peer could make the first weights: {run.last_refusal}"
        return steps.EndRun(RunState.FAILED, because)
    if observed.deadline_passed and eligible:
        return steps.AskPeers(tuple(sorted(eligible)))
    if run.pending:
        return steps.Wait("the first weights from 1 peer", run.pending[:1])
    if untried := eligible - refused:
        return steps.AskPeers((min(untried),), opens_phase=True)
    if _await_consent(run, observed):
        return _wait_for_quorum(run, observed, 1)
    return steps.Wait("a peer that can make the first weights")


def _decide_training(run: Run, observed: Observation) -> Step:
    eligible, quorum, answered = observed.eligible, run.spec.quorum, len(run.updates)
    is_due = observed.deadline_passed
    waits_for_all = not run.spec.select
    if answered >= quorum and (is_due or not (waits_for_all and run.pending)):
        late = {accepted.peer for accepted in run.buffer}
        return steps.CloseTraining(tuple(sorted(run.updates.keys() | late)))
    if back := (_with_status(run, "lost") & eligible) | _decided(run, eligible):
        return steps.AskPeers(tuple(sorted(back)))
    if is_due and (others := eligible - run.updates.keys()):
        # New and failed peers, and those already asked: the request may have been lost.
        return steps.AskPeers(tuple(sorted(others)))
    if (end := _cannot_begin(run, observed)) is not None:
        return end
    missing = quorum - answered - len(run.pending)
    if missing > 0:
        if new := eligible - run.peers.keys():
            count = math.ceil(run.spec.select * missing)
            return steps.AskPeers(select_peers(run, run.round, new, count))
        return _wait_for_quorum(run, observed, missing)
    if is_due:
        return steps.Wait(f"the quorum: {answered} of {quorum}; the deadline has passed")
    return steps.Wait(f"updates of {count_peers(len(run.pending))}", run.pending)


def _cannot_begin(run: Run, observed: Observation) -> steps.EndRun | steps.BeginModel | None:
    """The end of a model whose peers cannot train with its settings, in its first round only.

    Asking again would give the same answer. Without absent peers, it is also known that the others
    are too few for the quorum; in a buffered run each of these makes as many updates as needed.
    """
    refused = run.cooling_down if run.buffered else _with_status(run, "refused")
    answered = frozenset(run.updates)
    is_new = not (run.own_rounds or run.buffer or run.pending or run.assignments)
    is_open = bool(answered) and (run.buffered or bool(observed.absent))
    if (
        is_new
        and refused
        and observed.eligible <= refused | answered
        and not is_open
        and run.state is RunState.TRAINING
        and all(run.refusal_kinds.get(peer) in _LASTING_KINDS for peer in refused)
    ):
        who = f"only {count_peers(len(answered))}" if answered else "no peer"
        end = steps.EndRun(RunState.FAILED, f"{who} could train: {run.last_refusal}")
        return candidates.after(run, end)
    return None


def _with_status(run: Run, status: PeerStatus) -> set[str]:
    return {peer for peer, current in run.peers.items() if current == status}


def _decide_buffered(run: Run, observed: Observation) -> Step:
    evaluating = run.state is RunState.EVALUATING
    if evaluating and not run.evaluating:
        eligible = tuple(sorted(observed.eligible))
        return steps.OpenEvaluation(eligible) if eligible else steps.Wait("a peer")
    if buffered.is_over(run):
        left = observed.eligible.intersection(run.pending) - run.assignments.keys()
        if observed.deadline_passed or not left:
            return steps.CloseRound()
        return steps.Wait(f"the evaluation by {count_peers(len(left))}")
    if buffered.is_full(run):
        contributors = tuple(accepted.peer for accepted in buffered.in_order(run))
        return steps.CloseRound() if evaluating else steps.CloseTraining(contributors)
    if (end := _cannot_begin(run, observed)) is not None:
        return end
    decided = _decided(run, observed.eligible)
    if given := buffered.work_for(run, observed.eligible, observed.deadline_passed, decided):
        return steps.AssignWork(given)
    if not run.assignments and (awaiting := _await_consent(run, observed)):
        return _wait_for_quorum(run, observed, len(awaiting))
    missing = run.spec.buffer - len(run.buffer)
    behind = max((buffered.staleness(run, each) for each in run.assignments.values()), default=0)
    at_work = f"{count_peers(len(run.assignments))} at work, at most {behind} versions behind"
    return steps.Wait(f"{missing} of {run.spec.buffer} updates; {at_work}")


def _decide_evaluating(run: Run, observed: Observation) -> Step:
    if not run.evaluating:
        # With noise, no metric of held-out rows may show what the noise hides.
        if run.spec.only == "train" or not run.spec.measures or not observed.eligible:
            return steps.CloseRound()
        number = run.round - run.begun - 1
        if number % max(1, run.spec.evaluate_every) and run.round < run.spec.rounds:
            return steps.CloseRound()
        return steps.OpenEvaluation(tuple(sorted(observed.eligible)))
    if run.cohort is not None:
        return secure.decide(run, observed.sum)
    enough = run.spec.select and len(run.updates) >= run.spec.quorum
    if observed.deadline_passed or not run.pending or enough:
        if run.spec.secure and len(run.updates) >= secure.needs(run):
            return steps.FixCohort()
        return steps.CloseRound()
    return steps.Wait(f"the evaluation by {count_peers(len(run.pending))}", run.pending)
