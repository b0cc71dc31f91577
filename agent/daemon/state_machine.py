"""What the agent is doing, as a pure machine: `handle(worker, event)` gives the next worker and
instructions. No I/O, no clock.

Rule 1. Presence is a function of the worker (`presence`), so what is shown is what is.
Rule 2. A pause stops the trainer between two batches and takes no new work; it loses none.
Rule 3. A trainer that failed again and again is a pause too: no work is taken until it is lifted.
Rule 4. The policy's decision is one more pause, and how hard to work; it changes no other.
Rule 5. `finish` lets the work in hand end and be sent, then leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from protocols.messages.states import PauseReason, PeerState
from protocols.messages.work import Work


class AgentState(Struct, frozen=True, kw_only=True):
    """The agent now. `pauses` holds every reason that is in force and when it ends, `trouble` the
    trainer's.

    `policy` is why the policy pauses, in words, or empty. `share` of the time is worked.
    `free_at`, `free_until`: when the policy's pause ends, and its next begins. All Unix s, 0 is
    unknown.
    """

    session: bool = False
    mqtt: bool = False
    work: Work | None = None
    sending: bool = False
    pauses: Mapping[PauseReason, float] = {}
    trainer_failure: str = ""
    policy_reason: str = ""
    share: float = 1.0
    free_at: float = 0.0
    free_until: float = 0.0
    finishing: bool = False
    finished: bool = False


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


class PauseRequested(NamedTuple):
    """`until` (Unix s) is when it will be lifted, 0 if nobody knows."""

    reason: PauseReason
    until: float = 0.0


class PauseLifted(NamedTuple):
    reasons: frozenset[PauseReason]


class TrainerGaveUp(NamedTuple):
    """The trainer failed again and again; `kind` is the short word for how, `until` (Unix s) when
    it is tried again."""

    kind: str
    until: float = 0.0


class PolicyDecided(NamedTuple):
    """What `agent.policy` makes of the moment: see `Worker`."""

    reason: str = ""
    share: float = 1.0
    free_at: float = 0.0
    free_until: float = 0.0


class FinishRequested(NamedTuple):
    pass


Event = (
    SessionChanged
    | BrokerChanged
    | WorkStarted
    | SendingStarted
    | WorkEnded
    | PauseRequested
    | PauseLifted
    | TrainerGaveUp
    | PolicyDecided
    | FinishRequested
)

# --- instructions ---


class Announce(NamedTuple):
    """Say the new presence."""


class PauseTrainer(NamedTuple):
    pass


class ResumeTrainer(NamedTuple):
    pass


class SetPace(NamedTuple):
    """Work `share` of the time from now on."""

    share: float


class PollForWork(NamedTuple):
    """Ask the coordinator now: there may be work."""


class Shutdown(NamedTuple):
    """End the program cleanly."""


Instruction = Announce | PauseTrainer | ResumeTrainer | SetPace | PollForWork | Shutdown


def handle(state: AgentState, event: Event) -> tuple[AgentState, list[Instruction]]:
    """The worker after `event`, and what to do."""
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
        case PauseRequested(reason, until):
            after = replace(state, pauses={**state.pauses, reason: until})
        case PauseLifted(reasons):
            left = {why: until for why, until in state.pauses.items() if why not in reasons}
            after = replace(state, pauses=left)
        case TrainerGaveUp(kind, until):
            resting = {**state.pauses, PauseReason.TRAINER: until}
            after = replace(state, pauses=resting, trainer_failure=kind)
        case PolicyDecided(reason, share, free_at, free_until):
            after = replace(
                state, policy_reason=reason, share=share, free_at=free_at, free_until=free_until
            )
        case FinishRequested():
            after = replace(state, finishing=True)
    if after.finishing and after.work is None:
        after = replace(after, finished=True)
    return after, _instructions(state, after)


def _instructions(before: AgentState, after: AgentState) -> list[Instruction]:
    """What follows from the change alone: no event needs a rule of its own."""
    instructions: list[Instruction] = []
    if is_paused(after) and not is_paused(before):
        instructions.append(PauseTrainer())
    if is_paused(before) and not is_paused(after):
        instructions.append(ResumeTrainer())
    if after.share != before.share:
        instructions.append(SetPace(after.share))
    if _presence(before) != _presence(after):
        instructions.append(Announce())
    # Nobody may have rung while the broker was away, and nobody rings from now on if it went.
    if can_take_work(after) and (not can_take_work(before) or after.mqtt != before.mqtt):
        instructions.append(PollForWork())
    if after.finished and not before.finished:
        instructions.append(Shutdown())
    return instructions


def is_paused(state: AgentState) -> bool:
    """True if anything holds up the work."""
    return bool(state.pauses or state.policy_reason)


def is_willing(state: AgentState) -> bool:
    """True if more work may be taken once none is in hand."""
    return not is_paused(state) and not state.finishing


def can_take_work(state: AgentState) -> bool:
    """True if a message may be pulled now."""
    return state.work is None and is_willing(state)


def _presence(state: AgentState) -> tuple[object, ...]:
    return (*display_state(state), state.work, *availability(state))


def availability(state: AgentState) -> tuple[float, float]:
    """When it expects to work again, and until when it can from now on; Unix s, 0 is unknown."""
    if not is_paused(state):
        return 0.0, state.free_until
    known = [*state.pauses.values(), *([state.free_at] if state.policy_reason else [])]
    return (max(known) if all(known) else 0.0), 0.0


def display_state(state: AgentState) -> tuple[PeerState, str]:
    """State and reason, as presence and `status` say them."""
    if is_paused(state):
        reasons = [
            f"{reason}: {state.trainer_failure}"
            if state.trainer_failure and reason is PauseReason.TRAINER
            else reason
            for reason in sorted(state.pauses)
        ]
        return PeerState.PAUSED, ", ".join([*reasons, *filter(None, [state.policy_reason])])
    if state.sending:
        return PeerState.SENDING, ""
    if state.work is not None:
        return PeerState.TRAINING, "finishing" if state.finishing else ""
    return PeerState.IDLE, ""


def poll_interval_s(state: AgentState, since_work_s: float) -> float:
    """How long to wait for a doorbell before asking anyway.

    Without a broker nobody rings: ask often while a run is likely on, seldom otherwise.
    """
    if state.mqtt:
        return 15.0
    return 1.5 if since_work_s < 60.0 else 15.0
