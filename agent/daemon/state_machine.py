"""The agent's state machine: `handle(state, event)` returns the next state and instructions. Pure.

Rule 1. Presence is a function of the state alone.
Rule 2. A pause stops the trainer between two batches and prevents new work. No work is lost.
Rule 3. A trainer that has failed repeatedly is a pause, too.
Rule 4. The policy's decision is one more pause and a pace. It does not change other pauses.
Rule 5. While a secure sum has this peer's card, its steps are answered, also in a pause: other
        peers wait for them, and they take milliseconds. The exception is a pause because the
        coordinator cannot be trusted.
Rule 6. `finish` completes and sends the current work, then ends the agent. It lifts the operator's
        pause. While another pause forbids the work, the agent ends at once. Before that, it
        completes the steps of a secure sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from protocols.messages.states import COMPARING, PauseReason, PeerState
from protocols.messages.work import Work

#: The pauses that the operator's `resume` and `finish` lift.
LIFTED_BY_OPERATOR = frozenset({PauseReason.OPERATOR, PauseReason.TRAINER})
#: In these, not even the steps of a secure sum are answered.
_WITHOUT_STEPS = frozenset({PauseReason.FORK, PauseReason.WITNESS})


class PolicyDecided(NamedTuple):
    """The result of `agent.policy`: work `share` of the time, or pause for `reason`.

    `free_at`, `free_until`: when this pause ends, and when the next one starts; Unix s, 0 if
    unknown. `rules`: those that pause, sorted.
    """

    reason: str = ""
    share: float = 1.0
    free_at: float = 0.0
    free_until: float = 0.0
    rules: tuple[str, ...] = ()


class AgentState(Struct, frozen=True, kw_only=True):
    """What the agent is doing.

    `pauses` maps each active reason to its end (Unix s, 0 if unknown). `trainer_failure` is why
    the trainer is paused. `policy` is the policy's last decision. `in_sum`: a secure sum has this
    peer's card, and its steps are to come. `ahead`: the training in the background, for a round
    that the coordinator has not asked for yet. `comparing`: the run whose models are compared,
    while there is no work; empty for none.
    """

    session: bool = False
    mqtt: bool = False
    work: Work | None = None
    ahead: Work | None = None
    sending: bool = False
    in_sum: bool = False
    pauses: Mapping[PauseReason, float] = {}
    trainer_failure: str = ""
    policy: PolicyDecided = PolicyDecided()
    finishing: bool = False
    finished: bool = False
    comparing: str = ""

    @property
    def shown_work(self) -> Work | None:
        """The work of the trainer, including a round that was not asked for yet."""
        return self.work or self.ahead


# --- events ---


class SessionChanged(NamedTuple):
    up: bool


class BrokerChanged(NamedTuple):
    up: bool


class WorkStarted(NamedTuple):
    work: Work


class SendingStarted(NamedTuple):
    pass


class WorkEnded(NamedTuple):
    pass


class AheadChanged(NamedTuple):
    """Training in the background has begun, or ended (None)."""

    work: Work | None


class SumChanged(NamedTuple):
    """A card was given to a secure sum, or its last step was answered."""

    is_open: bool


class ComparingChanged(NamedTuple):
    """A part of the comparison after this run begins, or ends (empty)."""

    run: str


class PauseRequested(NamedTuple):
    """`until` (Unix s) is the end of the pause, 0 if unknown."""

    reason: PauseReason
    until: float = 0.0


class PauseLifted(NamedTuple):
    reasons: frozenset[PauseReason]


class TrainerGaveUp(NamedTuple):
    """The trainer has failed repeatedly, last by `kind`. It is tried again at `until` (Unix s)."""

    kind: str
    until: float = 0.0


class FinishRequested(NamedTuple):
    pass


Event = (
    SessionChanged
    | BrokerChanged
    | WorkStarted
    | SendingStarted
    | WorkEnded
    | AheadChanged
    | SumChanged
    | ComparingChanged
    | PauseRequested
    | PauseLifted
    | TrainerGaveUp
    | PolicyDecided
    | FinishRequested
)

# --- instructions ---


class Announce(NamedTuple):
    """Publish the presence."""


class PauseTrainer(NamedTuple):
    pass


class ResumeTrainer(NamedTuple):
    pass


class SetPace(NamedTuple):
    """Work `share` of the time, 0 < share <= 1."""

    share: float


class PollForWork(NamedTuple):
    """Ask the coordinator for work now."""


class Shutdown(NamedTuple):
    """End the agent."""


Instruction = Announce | PauseTrainer | ResumeTrainer | SetPace | PollForWork | Shutdown


def handle(state: AgentState, event: Event) -> tuple[AgentState, list[Instruction]]:
    """The state after `event`, and what to do."""
    match event:
        case SessionChanged(up):
            after = replace(state, session=up)
        case BrokerChanged(up):
            after = replace(state, mqtt=up)
        case WorkStarted(work):
            after = replace(state, work=work, sending=False)
        case SendingStarted():
            after = replace(state, sending=state.work is not None)
        case WorkEnded():
            after = replace(state, work=None, sending=False)
        case AheadChanged(work):
            after = replace(state, ahead=work)
        case SumChanged(is_open):
            after = replace(state, in_sum=is_open)
        case ComparingChanged(run):
            after = replace(state, comparing=run)
        case PauseRequested(reason, until):
            after = replace(state, pauses={**state.pauses, reason: until})
        case PauseLifted(reasons):
            after = replace(state, pauses=_without(state.pauses, reasons))
        case TrainerGaveUp(kind, until):
            pauses = {**state.pauses, PauseReason.TRAINER: until}
            after = replace(state, pauses=pauses, trainer_failure=kind)
        case PolicyDecided():
            after = replace(state, policy=event)
        case FinishRequested():
            pauses = _without(state.pauses, LIFTED_BY_OPERATOR)
            after = replace(state, pauses=pauses, finishing=True)
    is_held = is_paused(after) and not after.sending
    if after.finishing and (after.work is None or is_held) and not can_answer_steps(after):
        after = replace(after, finished=True)
    return after, _instructions(state, after)


def _without(
    pauses: Mapping[PauseReason, float], reasons: frozenset[PauseReason]
) -> dict[PauseReason, float]:
    return {why: until for why, until in pauses.items() if why not in reasons}


def _instructions(before: AgentState, after: AgentState) -> list[Instruction]:
    """The instructions that follow from a change of state, whatever the event was."""
    instructions: list[Instruction] = []
    if is_paused(after) and not is_paused(before):
        instructions.append(PauseTrainer())
    if is_paused(before) and not is_paused(after):
        instructions.append(ResumeTrainer())
    if after.policy.share != before.policy.share:
        instructions.append(SetPace(after.policy.share))
    if _presence(before) != _presence(after):
        instructions.append(Announce())
    # Doorbells may have been missed while the broker was down; they stop when it goes down.
    if can_take_work(after) and (not can_take_work(before) or after.mqtt != before.mqtt):
        instructions.append(PollForWork())
    if after.finished and not before.finished:
        instructions.append(Shutdown())
    return instructions


def is_paused(state: AgentState) -> bool:
    """True if anything pauses the work."""
    return bool(state.pauses or state.policy.reason)


def is_willing(state: AgentState) -> bool:
    """True if the agent may take work after the current work."""
    return not is_paused(state) and not state.finishing


def can_take_work(state: AgentState) -> bool:
    """True if the agent may pull a message now."""
    return state.work is None and is_willing(state)


def can_answer_steps(state: AgentState) -> bool:
    """True if the agent may answer a step of a secure sum, also while it is paused."""
    return state.in_sum and not state.pauses.keys() & _WITHOUT_STEPS


def _presence(state: AgentState) -> tuple[object, ...]:
    return (*display_state(state), state.policy.rules, state.shown_work, *availability(state))


def availability(state: AgentState) -> tuple[float, float]:
    """When the agent expects to work again, and until when it can work; Unix s, 0 if unknown."""
    if not is_paused(state):
        return 0.0, state.policy.free_until
    known = [*state.pauses.values(), *([state.policy.free_at] if state.policy.reason else [])]
    return (max(known) if all(known) else 0.0), 0.0


def display_state(state: AgentState) -> tuple[PeerState, str]:
    """State and reason as presence and `status` show them."""
    if PauseReason.FORK in state.pauses:
        return PeerState.ERROR, PauseReason.FORK
    if is_paused(state):
        reasons = [
            f"{reason}: {state.trainer_failure}"
            if state.trainer_failure and reason is PauseReason.TRAINER
            else reason
            for reason in sorted(state.pauses)
        ]
        return PeerState.PAUSED, ", ".join([*reasons, *filter(None, [state.policy.reason])])
    if state.sending:
        return PeerState.SENDING, ""
    if state.shown_work is not None:
        return PeerState.TRAINING, "finishing" if state.finishing else ""
    # It is there for work, as one that is idle.
    return PeerState.IDLE, COMPARING if state.comparing else ""


def poll_interval_s(state: AgentState, since_work_s: float) -> float:
    """How long to wait for a doorbell before polling.

    Without a broker there are no doorbells: poll often while a run is likely active.
    """
    if state.mqtt:
        return 15.0
    return 1.5 if since_work_s < 60.0 else 15.0
