"""The agent's state machine: tables of events and instructions, and its invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.daemon import state_machine
from agent.daemon.state_machine import (
    AgentState,
    AheadChanged,
    Announce,
    BrokerChanged,
    ComparingChanged,
    Event,
    FinishRequested,
    Instruction,
    PauseLifted,
    PauseRequested,
    PauseTrainer,
    PolicyDecided,
    PollForWork,
    ResumeTrainer,
    SendingStarted,
    SessionChanged,
    SetPace,
    Shutdown,
    SumChanged,
    TrainerGaveUp,
    WorkEnded,
    WorkStarted,
)
from protocols.messages.states import AVAILABLE, PauseReason, PeerState, label
from protocols.messages.work import Work

WORK = Work(run="r", round=1, kind="train", task="t")
USER, DISK = PauseReason.USER, PauseReason.DISK
IDLE = AgentState(session=True, mqtt=True)
BUSY_NOW = AgentState(session=True, mqtt=True, work=WORK)


def test_an_agent_that_compares_is_there_for_work_and_says_what_it_does() -> None:
    state, reason = state_machine.display_state(COMPARES)
    assert label(state, reason) == "◔ comparing"
    assert state in AVAILABLE
    assert state_machine.can_take_work(COMPARES)


def one(reason: PauseReason) -> frozenset[PauseReason]:
    return frozenset({reason})


def on(*reasons: PauseReason, until: float = 0.0) -> dict[PauseReason, float]:
    return dict.fromkeys(reasons, until)


COMPARES = AgentState(session=True, mqtt=True, comparing="r")
HELD = AgentState(work=WORK, pauses=on(PauseReason.OPERATOR))

TABLE: list[tuple[str, AgentState, Event, list[Instruction]]] = [
    ("a session alone says nothing", AgentState(), SessionChanged(True), []),
    ("a broker that is back: look", AgentState(), BrokerChanged(True), [PollForWork()]),
    ("a broker that went: look", IDLE, BrokerChanged(False), [PollForWork()]),
    ("a broker while at work", BUSY_NOW, BrokerChanged(False), []),
    ("work begins", IDLE, WorkStarted(WORK), [Announce()]),
    ("sending begins", BUSY_NOW, SendingStarted(), [Announce()]),
    ("sending without work", IDLE, SendingStarted(), []),
    ("work ends", BUSY_NOW, WorkEnded(), [Announce(), PollForWork()]),
    ("work ended already", IDLE, WorkEnded(), []),
    ("a comparison begins", IDLE, ComparingChanged("r"), [Announce()]),
    ("a comparison at work", BUSY_NOW, ComparingChanged("r"), []),
    ("work during a comparison", COMPARES, WorkStarted(WORK), [Announce()]),
    ("finishing during a comparison", COMPARES, FinishRequested(), [Shutdown()]),
    ("a pause at work", BUSY_NOW, PauseRequested(USER), [PauseTrainer(), Announce()]),
    ("a pause when idle", IDLE, PauseRequested(USER), [PauseTrainer(), Announce()]),
    ("a trainer that failed", IDLE, TrainerGaveUp("hung"), [PauseTrainer(), Announce()]),
    ("the same pause again", AgentState(pauses=on(USER)), PauseRequested(USER), []),
    ("a second reason", AgentState(pauses=on(USER)), PauseRequested(DISK), [Announce()]),
    (
        "the last reason is lifted",
        AgentState(pauses=on(USER)),
        PauseLifted(one(USER)),
        [ResumeTrainer(), Announce(), PollForWork()],
    ),
    (
        "one of two reasons is lifted",
        AgentState(pauses=on(USER, DISK)),
        PauseLifted(one(USER)),
        [Announce()],
    ),
    ("nothing to lift", IDLE, PauseLifted(one(USER)), []),
    ("finish when idle", IDLE, FinishRequested(), [Shutdown()]),
    ("finish at work", BUSY_NOW, FinishRequested(), [Announce()]),
    (
        "the last work ends",
        AgentState(work=WORK, finishing=True),
        WorkEnded(),
        [Announce(), Shutdown()],
    ),
    ("finish while paused", AgentState(pauses=on(USER)), FinishRequested(), [Shutdown()]),
    ("finish lifts the operator's pause", HELD, FinishRequested(), [ResumeTrainer(), Announce()]),
    (
        "finish at paused work",
        AgentState(work=WORK, pauses=on(USER)),
        FinishRequested(),
        [Shutdown()],
    ),
    (
        "a pause of the last work",
        AgentState(work=WORK, finishing=True),
        PauseRequested(USER),
        [PauseTrainer(), Announce(), Shutdown()],
    ),
    (
        "a pause while the last update is sent",
        AgentState(work=WORK, sending=True, finishing=True),
        PauseRequested(USER),
        [PauseTrainer(), Announce()],
    ),
    ("a card is given", BUSY_NOW, SumChanged(True), []),
    ("finish in a sum", AgentState(in_sum=True), FinishRequested(), []),
    (
        "a pause of the last work, with a sum to end",
        AgentState(work=WORK, finishing=True, in_sum=True),
        PauseRequested(USER),
        [PauseTrainer(), Announce()],
    ),
    ("the sum ends", AgentState(in_sum=True, finishing=True), SumChanged(False), [Shutdown()]),
    (
        "a sum of a coordinator that is not to be trusted",
        AgentState(in_sum=True, finishing=True, pauses=on(PauseReason.FORK)),
        WorkEnded(),
        [Shutdown()],
    ),
    ("training ahead begins", IDLE, AheadChanged(WORK), [Announce()]),
    ("training ahead begins at work", BUSY_NOW, AheadChanged(WORK), []),
    (
        "finish while training ahead",
        AgentState(ahead=WORK),
        FinishRequested(),
        [Announce(), Shutdown()],
    ),
    ("finish again", AgentState(finishing=True, finished=True), FinishRequested(), []),
    ("a broker after leaving", AgentState(finishing=True, finished=True), BrokerChanged(True), []),
]


@pytest.mark.parametrize(
    ("before", "event", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_transitions(before: AgentState, event: Event, expected: list[Instruction]) -> None:
    found = state_machine.handle(before, event)[1]
    # By type: without fields, all named tuples are equal.
    assert [type(one) for one in found] == [type(one) for one in expected]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (IDLE, (PeerState.IDLE, "")),
        (BUSY_NOW, (PeerState.TRAINING, "")),
        (AgentState(ahead=WORK), (PeerState.TRAINING, "")),
        (AgentState(work=WORK, ahead=WORK, sending=True), (PeerState.SENDING, "")),
        (AgentState(work=WORK, finishing=True), (PeerState.TRAINING, "finishing")),
        (AgentState(work=WORK, sending=True), (PeerState.SENDING, "")),
        (AgentState(work=WORK, pauses=on(USER)), (PeerState.PAUSED, "by its owner")),
        (
            AgentState(pauses=on(PauseReason.TRAINER), trainer_failure="out of memory"),
            (PeerState.PAUSED, "trainer failed: out of memory"),
        ),
        (
            AgentState(pauses=on(USER, PauseReason.DISK)),
            (PeerState.PAUSED, "by its owner, disk full"),
        ),
        (
            AgentState(work=WORK, policy=PolicyDecided("on battery")),
            (PeerState.PAUSED, "on battery"),
        ),
        (
            AgentState(pauses=on(USER), policy=PolicyDecided("on battery")),
            (PeerState.PAUSED, "by its owner, on battery"),
        ),
    ],
)
def test_display_state(now: AgentState, expected: tuple[PeerState, str]) -> None:
    assert state_machine.display_state(now) == expected


@pytest.mark.parametrize(
    ("mqtt", "since_work_s", "most_s"), [(True, 0, 15), (False, 1, 2), (False, 100, 15)]
)
def test_polling_is_slow_while_the_broker_is_up(
    mqtt: bool, since_work_s: float, most_s: float
) -> None:
    assert 1 <= state_machine.poll_interval_s(AgentState(mqtt=mqtt), since_work_s) <= most_s


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (IDLE, (0.0, 0.0)),
        (AgentState(policy=PolicyDecided(free_until=9.0)), (0.0, 9.0)),
        (AgentState(policy=PolicyDecided("schedule", free_at=5.0, free_until=9.0)), (5.0, 0.0)),
        (AgentState(pauses=on(USER, until=7.0)), (7.0, 0.0)),
        (
            AgentState(pauses=on(USER, until=7.0), policy=PolicyDecided("schedule", free_at=5.0)),
            (7.0, 0.0),
        ),
        (AgentState(pauses=on(USER, until=7.0), policy=PolicyDecided("on battery")), (0.0, 0.0)),
        (AgentState(pauses=on(USER), policy=PolicyDecided("schedule", free_at=5.0)), (0.0, 0.0)),
        (AgentState(pauses={USER: 7.0, PauseReason.OPERATOR: 9.0}), (9.0, 0.0)),
        (AgentState(pauses={USER: 7.0, PauseReason.OPERATOR: 0.0}), (0.0, 0.0)),
    ],
)
def test_availability(now: AgentState, expected: tuple[float, float]) -> None:
    assert state_machine.availability(now) == expected


def test_pauses_of_the_policy_and_the_owner_are_independent() -> None:
    paused, told = state_machine.handle(BUSY_NOW, PolicyDecided(reason="on battery"))
    assert told == [PauseTrainer(), Announce()]
    both, told = state_machine.handle(paused, PauseRequested(USER))
    assert told == [Announce()]
    user, told = state_machine.handle(both, PolicyDecided(share=0.5))
    assert told == [SetPace(0.5), Announce()]
    _, told = state_machine.handle(user, PauseLifted(one(USER)))
    assert told == [ResumeTrainer(), Announce()]


def told(now: AgentState) -> object:
    shown = state_machine.display_state(now)
    return shown, now.policy.rules, now.shown_work, state_machine.availability(now)


EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(SessionChanged, st.booleans()),
    st.builds(BrokerChanged, st.booleans()),
    st.just(WorkStarted(WORK)),
    st.just(SendingStarted()),
    st.just(WorkEnded()),
    st.builds(SumChanged, st.booleans()),
    st.sampled_from([AheadChanged(WORK), AheadChanged(None)]),
    st.builds(PolicyDecided, st.sampled_from(["", "on battery"]), st.sampled_from([0.5, 1.0])),
    st.builds(PauseRequested, st.sampled_from(PauseReason)),
    st.builds(TrainerGaveUp, st.text()),
    st.builds(PauseLifted, st.frozensets(st.sampled_from(PauseReason), max_size=2)),
    st.just(FinishRequested()),
)


@given(st.lists(EVENTS, max_size=40))
def test_invariants_hold_for_any_events(events: list[Event]) -> None:
    now, announced = AgentState(), state_machine.display_state(AgentState())
    trainer_paused, times_left = False, 0
    for event in events:
        before = now
        now, instructions = state_machine.handle(now, event)
        assert len({type(one) for one in instructions}) == len(instructions)
        for instruction in instructions:
            match instruction:
                case Announce():
                    assert told(now) != told(before)
                    announced = state_machine.display_state(now)
                case PauseTrainer():
                    assert not trainer_paused
                    trainer_paused = True
                case ResumeTrainer():
                    assert trainer_paused
                    trainer_paused = False
                case PollForWork():
                    assert state_machine.can_take_work(now)
                    assert not state_machine.is_paused(now)
                    assert now.work is None
                    assert not now.finishing
                case Shutdown():
                    times_left += 1
        # Presence shows the state, and the trainer is paused exactly while a pause is active.
        assert announced == state_machine.display_state(now)
        assert trainer_paused == state_machine.is_paused(now)
        shown = state_machine.display_state(now)[0]
        # A coordinator that showed two versions is an error, which pauses the work too.
        wanted = PeerState.ERROR if PauseReason.FORK in now.pauses else PeerState.PAUSED
        assert (shown is wanted) == state_machine.is_paused(now)
        assert not (now.sending and now.work is None)
        # It shuts down once, and without work that it may do.
        assert times_left == now.finished
        assert now.finishing or not now.finished
        # Steps of a sum are answered in every pause but those that doubt the coordinator.
        doubts = {PauseReason.FORK, PauseReason.WITNESS} & now.pauses.keys()
        assert state_machine.can_answer_steps(now) == (now.in_sum and not doubts)
        if now.finished and not before.finished:
            assert now.work is None or (state_machine.is_paused(now) and not now.sending)
