"""The agent as a machine: tables of events and instructions, and what holds whatever comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.daemon import state_machine
from agent.daemon.state_machine import (
    Announce,
    BrokerChanged,
    Event,
    FinishAsked,
    Instruction,
    Leave,
    LookForWork,
    PauseAsked,
    PauseLifted,
    PauseTrainer,
    PolicyDecided,
    ResumeTrainer,
    SendingBegan,
    SessionChanged,
    SetPace,
    TrainerGaveUp,
    WorkBegan,
    WorkEnded,
    Worker,
)
from protocols.messages.states import PauseReason, PeerState
from protocols.messages.work import Work

WORK = Work(run="r", round=1, kind="train", task="t")
USER, DISK = PauseReason.USER, PauseReason.DISK
IDLE = Worker(session=True, mqtt=True)
BUSY_NOW = Worker(session=True, mqtt=True, work=WORK)


def one(reason: PauseReason) -> frozenset[PauseReason]:
    return frozenset({reason})


def on(*reasons: PauseReason, until: float = 0.0) -> dict[PauseReason, float]:
    return dict.fromkeys(reasons, until)


TABLE: list[tuple[str, Worker, Event, list[Instruction]]] = [
    ("a session alone says nothing", Worker(), SessionChanged(True), []),
    ("a broker that is back: look", Worker(), BrokerChanged(True), [LookForWork()]),
    ("a broker that went: look", IDLE, BrokerChanged(False), [LookForWork()]),
    ("a broker while at work", BUSY_NOW, BrokerChanged(False), []),
    ("work begins", IDLE, WorkBegan(WORK), [Announce()]),
    ("sending begins", BUSY_NOW, SendingBegan(), [Announce()]),
    ("sending without work", IDLE, SendingBegan(), []),
    ("work ends", BUSY_NOW, WorkEnded(), [Announce(), LookForWork()]),
    ("work ended already", IDLE, WorkEnded(), []),
    ("a pause at work", BUSY_NOW, PauseAsked(USER), [PauseTrainer(), Announce()]),
    ("a pause when idle", IDLE, PauseAsked(USER), [PauseTrainer(), Announce()]),
    ("a trainer that failed", IDLE, TrainerGaveUp("hung"), [PauseTrainer(), Announce()]),
    ("the same pause again", Worker(pauses=on(USER)), PauseAsked(USER), []),
    ("a second reason", Worker(pauses=on(USER)), PauseAsked(DISK), [Announce()]),
    (
        "the last reason is lifted",
        Worker(pauses=on(USER)),
        PauseLifted(one(USER)),
        [ResumeTrainer(), Announce(), LookForWork()],
    ),
    (
        "one of two reasons is lifted",
        Worker(pauses=on(USER, DISK)),
        PauseLifted(one(USER)),
        [Announce()],
    ),
    ("nothing to lift", IDLE, PauseLifted(one(USER)), []),
    ("finish when idle", IDLE, FinishAsked(), [Leave()]),
    ("finish at work", BUSY_NOW, FinishAsked(), [Announce()]),
    (
        "the last work ends",
        Worker(work=WORK, finishing=True),
        WorkEnded(),
        [Announce(), Leave()],
    ),
    ("finish while paused", Worker(pauses=on(USER)), FinishAsked(), [Leave()]),
    ("finish again", Worker(finishing=True, left=True), FinishAsked(), []),
    ("a broker after leaving", Worker(finishing=True, left=True), BrokerChanged(True), []),
]


@pytest.mark.parametrize(
    ("before", "event", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_the_table(before: Worker, event: Event, expected: list[Instruction]) -> None:
    found = state_machine.handle(before, event)[1]
    # By type: without fields, all named tuples are equal.
    assert [type(one) for one in found] == [type(one) for one in expected]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (IDLE, (PeerState.IDLE, "")),
        (BUSY_NOW, (PeerState.TRAINING, "")),
        (Worker(work=WORK, finishing=True), (PeerState.TRAINING, "finishing")),
        (Worker(work=WORK, sending=True), (PeerState.SENDING, "")),
        (Worker(work=WORK, pauses=on(USER)), (PeerState.PAUSED, "by its owner")),
        (
            Worker(pauses=on(PauseReason.TRAINER), trouble="out of memory"),
            (PeerState.PAUSED, "trainer failed: out of memory"),
        ),
        (
            Worker(pauses=on(USER, PauseReason.DISK)),
            (PeerState.PAUSED, "by its owner, disk full"),
        ),
        (Worker(work=WORK, policy="on battery"), (PeerState.PAUSED, "on battery")),
        (
            Worker(pauses=on(USER), policy="on battery"),
            (PeerState.PAUSED, "by its owner, on battery"),
        ),
    ],
)
def test_what_is_shown(now: Worker, expected: tuple[PeerState, str]) -> None:
    assert state_machine.shown(now) == expected


@pytest.mark.parametrize(
    ("mqtt", "since_work_s", "most_s"), [(True, 0, 15), (False, 1, 2), (False, 100, 15)]
)
def test_the_poll_is_slow_where_a_doorbell_rings(
    mqtt: bool, since_work_s: float, most_s: float
) -> None:
    assert 1 <= state_machine.poll_s(Worker(mqtt=mqtt), since_work_s) <= most_s


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (IDLE, (0.0, 0.0)),
        (Worker(free_until=9.0), (0.0, 9.0)),
        (Worker(policy="schedule", free_at=5.0, free_until=9.0), (5.0, 0.0)),
        (Worker(pauses=on(USER, until=7.0)), (7.0, 0.0)),
        (Worker(pauses=on(USER, until=7.0), policy="schedule", free_at=5.0), (7.0, 0.0)),
        (Worker(pauses=on(USER, until=7.0), policy="on battery"), (0.0, 0.0)),
        (Worker(pauses=on(USER), policy="schedule", free_at=5.0), (0.0, 0.0)),
        (Worker(pauses={USER: 7.0, PauseReason.OPERATOR: 9.0}), (9.0, 0.0)),
        (Worker(pauses={USER: 7.0, PauseReason.OPERATOR: 0.0}), (0.0, 0.0)),
    ],
)
def test_when_it_expects_to_be_free(now: Worker, expected: tuple[float, float]) -> None:
    assert state_machine.free(now) == expected


def test_the_policy_pauses_and_paces_beside_the_owner() -> None:
    paused, told = state_machine.handle(BUSY_NOW, PolicyDecided(reason="on battery"))
    assert told == [PauseTrainer(), Announce()]
    both, told = state_machine.handle(paused, PauseAsked(USER))
    assert told == [Announce()]
    user, told = state_machine.handle(both, PolicyDecided(share=0.5))
    assert told == [SetPace(0.5), Announce()]
    _, told = state_machine.handle(user, PauseLifted(one(USER)))
    assert told == [ResumeTrainer(), Announce()]


def told(now: Worker) -> object:
    return state_machine.shown(now), now.work, state_machine.free(now)


EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(SessionChanged, st.booleans()),
    st.builds(BrokerChanged, st.booleans()),
    st.just(WorkBegan(WORK)),
    st.just(SendingBegan()),
    st.just(WorkEnded()),
    st.builds(PolicyDecided, st.sampled_from(["", "on battery"]), st.sampled_from([0.5, 1.0])),
    st.builds(PauseAsked, st.sampled_from(PauseReason)),
    st.builds(TrainerGaveUp, st.text()),
    st.builds(PauseLifted, st.frozensets(st.sampled_from(PauseReason), max_size=2)),
    st.just(FinishAsked()),
)


@given(st.lists(EVENTS, max_size=40))
def test_whatever_comes(events: list[Event]) -> None:
    now, announced = Worker(), state_machine.shown(Worker())
    trainer_paused, times_left = False, 0
    for event in events:
        before = now
        now, instructions = state_machine.handle(now, event)
        assert len({type(one) for one in instructions}) == len(instructions)
        for instruction in instructions:
            match instruction:
                case Announce():
                    assert told(now) != told(before)
                    announced = state_machine.shown(now)
                case PauseTrainer():
                    assert not trainer_paused
                    trainer_paused = True
                case ResumeTrainer():
                    assert trainer_paused
                    trainer_paused = False
                case LookForWork():
                    assert state_machine.can_take_work(now)
                    assert not state_machine.is_paused(now)
                    assert now.work is None
                    assert not now.finishing
                case Leave():
                    times_left += 1
        # What others see is what is; the trainer stands still exactly while a pause is in force.
        assert announced == state_machine.shown(now)
        assert trainer_paused == state_machine.is_paused(now)
        assert (state_machine.shown(now)[0] is PeerState.PAUSED) == state_machine.is_paused(now)
        assert not (now.sending and now.work is None)
        # It leaves once, and with no work in hand.
        assert times_left == now.left
        assert now.finishing or not now.left
        if now.left and not before.left:
            assert now.work is None
