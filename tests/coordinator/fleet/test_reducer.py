"""The fold: who is heard, what is ignored, and that nothing from the wire breaks it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.fleet import reducer as fleets
from coordinator.fleet.readings import (
    current_run,
    describe_state,
    has_presence,
    num_available,
    num_enrolled,
    num_without_presence,
    shown_state,
)
from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet, decode, encode, rebase_times
from protocols.errors import BadMessage
from protocols.messages.envelope import (
    Body,
    Command,
    Doorbell,
    Envelope,
    EventLine,
    JobChanged,
    Links,
    Notice,
    PeerChanged,
    Presence,
    RoundClosed,
    RunChanged,
    Telemetry,
)
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR

NOW = 1_790_000_000.0
KEY = b"k" * 32
NAN, INF = math.nan, math.inf


def said(sender: str, seq: int, body: Body, epoch: str = "e1", at: float = NOW) -> Envelope:
    return Envelope(sender=sender, epoch=epoch, seq=seq, at=at, body=body)


def new_fleet(*peers: str) -> Fleet:
    fleet = Fleet(fleet="0" * 16)
    for seq, peer in enumerate(peers, 1):
        known = PeerChanged(peer=peer, name=peer.lower(), public_key=KEY)
        reduce(fleet, said(COORDINATOR, seq, known), NOW)
    return fleet


def is_(state: PeerState, reason: str = "") -> Presence:
    return Presence(state=state, reason=reason, run="r", round=3)


def will() -> Presence:
    return Presence(state=PeerState.OFFLINE, will=True)


def run_at(round_: int, run: str = "r", state: RunState = RunState.TRAINING) -> RunChanged:
    return RunChanged(run=run, task="t", state=state, round=round_, rounds=9, quorum=2)


def closed(round_: int, **more: Any) -> RoundClosed:
    return RoundClosed(
        **{
            "run": "r",
            "round": round_,
            "digest": "0" * 64,
            "seconds": 1.0,
            "peers": 2,
            "loss": 0.5,
            **more,
        }
    )


# --- peers -----------------------------------------------------------------------------------


def test_presence_replaces_what_a_peer_said_before() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 1, is_(PeerState.IDLE)), NOW)
    reduce(fleet, said("A", 2, is_(PeerState.PAUSED, "battery")), NOW + 1)
    peer = fleet.peers["A"]
    assert (peer.state, peer.reason, peer.run, peer.round) == (PeerState.PAUSED, "battery", "r", 3)
    assert (peer.seen_at, peer.missed, peer.ignored) == (NOW + 1, 0, 0)


def test_an_older_message_of_the_same_epoch_is_ignored() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 5, is_(PeerState.TRAINING)), NOW)
    reduce(fleet, said("A", 4, is_(PeerState.IDLE)), NOW)
    reduce(fleet, said("A", 5, is_(PeerState.IDLE)), NOW)
    assert fleet.peers["A"].state is PeerState.TRAINING
    assert fleet.peers["A"].ignored == 2


def test_retained_presence_after_newer_telemetry_is_heard() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 7, Telemetry(loss=1.0)), NOW)
    reduce(fleet, said("A", 3, is_(PeerState.TRAINING)), NOW)
    assert fleet.peers["A"].state is PeerState.TRAINING
    assert fleet.peers["A"].telemetry == Telemetry(loss=1.0)


def test_missed_numbers_are_counted() -> None:
    fleet = new_fleet("A")
    for seq in (1, 2, 6, 7):
        reduce(fleet, said("A", seq, Telemetry()), NOW)
    assert fleet.peers["A"].missed == 3


def test_a_new_epoch_replaces_and_the_old_one_stays_silent() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 9, is_(PeerState.TRAINING), "e1"), NOW)
    reduce(fleet, said("A", 1, is_(PeerState.IDLE), "e2"), NOW)
    reduce(fleet, said("A", 10, is_(PeerState.ERROR), "e1"), NOW)
    assert fleet.peers["A"].state is PeerState.IDLE
    assert fleet.peers["A"].epoch == "e2"


def test_a_will_of_the_present_epoch_turns_the_peer_offline() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 2, is_(PeerState.TRAINING)), NOW)
    reduce(fleet, said("A", 1, will()), NOW + 5)
    peer = fleet.peers["A"]
    assert (peer.state, peer.reason) == (PeerState.OFFLINE, "connection lost")
    assert peer.seen_at == NOW, "a will is not a sign of life"
    assert [event.text for event in fleet.events] == ["a lost its connection"]


def test_a_will_of_another_epoch_is_ignored() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 2, is_(PeerState.TRAINING), "e1"), NOW)
    reduce(fleet, said("A", 2, is_(PeerState.TRAINING), "e2"), NOW)
    reduce(fleet, said("A", 1, will(), "e1"), NOW)
    reduce(fleet, said("A", 1, will(), "e0"), NOW)
    assert fleet.peers["A"].state is PeerState.TRAINING


def test_a_will_counts_once() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 2, is_(PeerState.TRAINING)), NOW)
    reduce(fleet, said("A", 1, will()), NOW)
    reduce(fleet, said("A", 4, is_(PeerState.TRAINING)), NOW)
    reduce(fleet, said("A", 1, will()), NOW)
    assert fleet.peers["A"].state is PeerState.TRAINING
    reduce(fleet, said("A", 3, will()), NOW)
    assert fleet.peers["A"].state is PeerState.OFFLINE


def test_a_retained_will_is_all_that_is_known_of_a_peer_never_heard() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 1, will()), NOW)
    assert fleet.peers["A"].reason == "connection lost"
    assert fleet.events == []


def test_nobody_speaks_for_an_unknown_or_removed_peer() -> None:
    fleet = new_fleet("A")
    gone = PeerChanged(peer="A", name="a", enrollment="removed", public_key=KEY)
    reduce(fleet, said(COORDINATOR, 2, gone), NOW)
    reduce(fleet, said("A", 1, is_(PeerState.IDLE)), NOW)
    reduce(fleet, said("B", 1, Telemetry()), NOW)
    assert fleet.peers == {}


def test_a_peer_does_not_speak_as_the_coordinator() -> None:
    fleet = new_fleet("A")
    for body in (run_at(1), Links(mqtt=True, flower=True), EventLine(level="error", text="x")):
        reduce(fleet, said("A", 9, body), NOW)
    known = PeerChanged(peer="B", name="b", public_key=KEY)
    reduce(fleet, said("A", 9, known), NOW)
    assert (fleet.runs, list(fleet.peers), fleet.events) == ({}, ["A"], [])
    assert not fleet.links.mqtt


def test_a_peer_that_enrols_again_with_another_key_starts_anew() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 50, is_(PeerState.TRAINING)), NOW)
    again = PeerChanged(peer="A", name="a", public_key=b"n" * 32)
    reduce(fleet, said(COORDINATOR, 2, again), NOW)
    assert fleet.peers["A"].seq == -1
    assert fleet.peers["A"].state is PeerState.OFFLINE


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stops_at_the_gate(value: float) -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 1, Telemetry(loss=1.5)), NOW)
    bad = Telemetry(
        loss=value, samples_per_s=value, cpu_percent=value, battery_percent=value, step=3
    )
    reduce(fleet, said("A", 2, bad), NOW)
    peer = fleet.peers["A"]
    assert peer.diverged
    assert peer.losses == [1.5, None]
    assert peer.telemetry == Telemetry(step=3)
    reduce(fleet, said(COORDINATOR, 2, run_at(1)), NOW)
    worse = closed(1, loss=value, accuracy=value, seconds=value, norms={"A": value, "B": 2.0})
    reduce(fleet, said(COORDINATOR, 3, worse), NOW)
    kept = fleet.runs["r"].rounds[0]
    assert (kept.diverged, kept.loss, kept.accuracy, kept.seconds) == (True, None, None, 0.0)
    assert kept.norms == {"B": 2.0}
    assert decode(encode(fleet, NOW)) == fleet


def test_loss_history_is_bounded_and_belongs_to_one_run() -> None:
    fleet = new_fleet("A")
    for seq in range(1, 300):
        reduce(fleet, said("A", seq, Telemetry(run="r", loss=float(seq))), NOW)
    assert fleet.peers["A"].losses[-1] == 299.0
    assert len(fleet.peers["A"].losses) == fleets.MAX_LOSSES
    reduce(fleet, said("A", 300, Telemetry(run="s", loss=7.0)), NOW)
    assert fleet.peers["A"].losses == [7.0]


def test_the_sources_of_a_version_are_known_by_peer() -> None:
    fleet = new_fleet("A")
    known = PeerChanged(peer="A", name="a", public_key=KEY, fetched_from={"B": 3e6, "C": NAN})
    reduce(fleet, said(COORDINATOR, 2, known), NOW)
    assert fleet.peers["A"].fetched_from == {"B": 3e6}
    assert decode(encode(fleet, NOW)).peers["A"].fetched_from == {"B": 3e6}


def test_a_job_and_an_evaluation_leave_the_losses_of_the_training() -> None:
    fleet = new_fleet("A")
    job = JobChanged(job="scatter-1", kind="scatter", state="working", done=0, total=9)
    reduce(fleet, said(COORDINATOR, 2, job), NOW)
    reduce(fleet, said("A", 1, Telemetry(run="r", phase="train", loss=0.5)), NOW)
    reduce(fleet, said("A", 2, Telemetry(run="r", phase="evaluate", loss=0.0)), NOW)
    reduce(fleet, said("A", 3, Telemetry(run="scatter-1", loss=0.0)), NOW)
    assert fleet.peers["A"].losses == [0.5]
    reduce(fleet, said("A", 4, Telemetry(run="r", phase="train", loss=0.4)), NOW)
    assert fleet.peers["A"].losses == [0.5, 0.4], "the same run continues after the job"


def test_silence_is_seen_and_not_stored() -> None:
    fleet = new_fleet("A", "B")
    reduce(fleet, said("A", 1, is_(PeerState.TRAINING)), NOW)
    reduce(fleet, said("B", 1, is_(PeerState.IDLE)), NOW)
    a, b = fleet.peers["A"], fleet.peers["B"]
    assert shown_state(a, NOW + 30) is PeerState.TRAINING
    assert shown_state(a, NOW + 31) is PeerState.STALE
    assert shown_state(b, NOW + 90) is PeerState.IDLE
    assert shown_state(b, NOW + 91) is PeerState.STALE
    assert a.state is PeerState.TRAINING
    assert num_available(fleet, NOW + 31) == 1
    reduce(fleet, said("A", 2, Telemetry()), NOW + 40)
    assert shown_state(a, NOW + 41) is PeerState.TRAINING


def test_a_state_from_requests_stands_in_for_missing_presence() -> None:
    fleet = new_fleet("A")
    peer = fleet.peers["A"]

    def requests_show(seq: int, state: PeerState, *, session: bool = True) -> None:
        known = PeerChanged(peer="A", name="a", public_key=KEY, has_session=session, state=state)
        reduce(fleet, said(COORDINATOR, seq, known), NOW)

    assert describe_state(peer, NOW) == "✕ offline: not seen yet"
    requests_show(2, PeerState.TRAINING)
    later = NOW + 1000  # without any message over MQTT
    assert describe_state(peer, later) == "● training: MQTT presence missing"
    assert num_available(fleet, later) == num_without_presence(fleet) == 1
    assert not has_presence(peer, later)
    reduce(fleet, said("A", 1, is_(PeerState.PAUSED, "battery")), later)
    assert describe_state(peer, later) == "‖ paused: battery"
    assert num_without_presence(fleet) == 0
    reduce(fleet, said("A", 2, Telemetry(run="r", step=3, steps=9)), later)
    requests_show(3, PeerState.IDLE)
    assert (peer.run, peer.telemetry) == ("", None), "it was true of another time"
    requests_show(4, PeerState.OFFLINE, session=False)
    assert describe_state(peer, later) == "✕ offline: session ended"
    assert num_available(fleet, later) == num_without_presence(fleet) == 0


def test_a_peer_without_a_session_is_not_counted_whatever_its_presence_says() -> None:
    fleet = new_fleet("A")
    known = PeerChanged(peer="A", name="a", public_key=KEY, has_session=False)
    reduce(fleet, said(COORDINATOR, 2, known), NOW)
    reduce(fleet, said("A", 1, is_(PeerState.IDLE)), NOW)
    assert describe_state(fleet.peers["A"], NOW) == "○ idle: Flower session missing"
    assert num_available(fleet, NOW) == 0


def test_a_peer_that_awaits_approval_is_shown_so_whatever_it_says() -> None:
    fleet = Fleet(fleet="0" * 16)
    known = PeerChanged(peer="A", name="a", enrollment="awaiting", public_key=KEY)
    reduce(fleet, said(COORDINATOR, 1, known), NOW)
    reduce(fleet, said("A", 1, is_(PeerState.TRAINING)), NOW)
    assert shown_state(fleet.peers["A"], NOW) is PeerState.AWAITING
    assert num_enrolled(fleet) == 0


def test_a_notice_and_a_first_error_become_events() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said("A", 1, Notice(level="warning", text="disk nearly full")), NOW)
    reduce(fleet, said("A", 2, is_(PeerState.ERROR, "no disk")), NOW)
    reduce(fleet, said("A", 3, is_(PeerState.ERROR, "no disk")), NOW)
    texts = [event.text for event in fleet.events]
    assert texts == ["a: disk nearly full", "a has an error: no disk"]
    assert fleet.num_events == 2


# --- the coordinator -------------------------------------------------------------------------


def test_a_missing_number_of_the_coordinator_is_a_gap() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said(COORDINATOR, 2, run_at(1)), NOW)
    assert not fleet.gap
    reduce(fleet, said(COORDINATOR, 4, run_at(2)), NOW)
    assert fleet.gap
    assert fleet.runs["r"].changed.round == 2


def test_a_restarted_coordinator_is_a_gap_and_its_old_words_are_ignored() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said(COORDINATOR, 1, run_at(5), "e2"), NOW)
    assert fleet.gap
    reduce(fleet, said(COORDINATOR, 99, run_at(1), "e1"), NOW)
    assert fleet.runs["r"].changed.round == 5
    assert (fleet.epoch, fleet.seq) == ("e2", 1)


def test_commands_and_doorbells_do_not_count_as_events_of_the_coordinator() -> None:
    fleet = new_fleet("A")
    reduce(fleet, said(COORDINATOR, 40, Command(action="pause")), NOW)
    reduce(fleet, said(COORDINATOR, 41, Doorbell()), NOW)
    reduce(fleet, said(COORDINATOR, 2, run_at(1)), NOW)
    assert not fleet.gap
    assert "r" in fleet.runs


def test_rounds_stay_in_order_and_one_a_number() -> None:
    fleet = new_fleet()
    reduce(fleet, said(COORDINATOR, 1, run_at(1)), NOW)
    for seq, number in enumerate((1, 2, 4, 3, 4), 2):
        body = closed(number, seconds=float(seq), norms={"A": 1.0})
        reduce(fleet, said(COORDINATOR, seq, body), NOW)
    rounds = fleet.runs["r"].rounds
    assert [r.round for r in rounds] == [1, 2, 3, 4]
    assert rounds[-1].seconds == 6.0
    assert [bool(r.norms) for r in rounds] == [False, False, False, True]


def test_a_round_of_an_unknown_run_asks_for_a_snapshot() -> None:
    fleet = new_fleet()
    reduce(fleet, said(COORDINATOR, 1, closed(1)), NOW)
    assert fleet.gap


def test_everything_kept_is_bounded() -> None:
    fleet = new_fleet()
    seq = 0
    for number in range(2_100):
        seq += 1
        reduce(fleet, said(COORDINATOR, seq, run_at(1)), NOW)
        seq += 1
        reduce(fleet, said(COORDINATOR, seq, closed(number)), NOW)
        seq += 1
        reduce(fleet, said(COORDINATOR, seq, EventLine(level="info", text=str(number))), NOW)
    assert len(fleet.runs["r"].rounds) == fleets.MAX_ROUNDS_PER_RUN
    assert fleets.MAX_EVENTS <= len(fleet.events) <= fleets.MAX_EVENTS + 100
    assert fleet.events[-1].text == "2099"
    for number in range(40):
        seq += 1
        ended = run_at(1, f"run-{number}", RunState.FINISHED)
        reduce(fleet, said(COORDINATOR, seq, ended), NOW)
    assert len(fleet.runs) == fleets.MAX_RUNS
    assert "r" in fleet.runs, "ended runs go first"


def test_the_run_under_way_matters_more_than_one_that_ended_later() -> None:
    fleet = new_fleet()
    assert current_run(fleet) is None
    reduce(fleet, said(COORDINATOR, 1, run_at(1, "one")), NOW)
    reduce(fleet, said(COORDINATOR, 2, run_at(9, "two", RunState.FINISHED)), NOW + 9)
    run = current_run(fleet)
    assert run is not None
    assert run.changed.run == "one"


def test_a_snapshot_moves_to_the_clock_of_its_reader() -> None:
    fleet = new_fleet("A", "B")
    reduce(fleet, said("A", 1, Notice(level="info", text="hello")), NOW)
    there = rebase_times(decode(encode(fleet, NOW + 5)), NOW + 1005)
    assert there.peers["A"].seen_at == NOW + 1000
    assert there.peers["B"].seen_at == 0.0
    assert there.events[0].at == NOW + 1000


def test_a_snapshot_keeps_its_field_names_on_the_wire() -> None:
    fleet = new_fleet("A")
    fleet.peers["A"].contributions, fleet.peers["A"].contributions_run = "101", "r"
    peer = json.loads(encode(fleet, NOW))["peers"]["A"]
    assert (peer["given"], peer["given_run"], peer["standing"]) == ("101", "r", "enrolled")


def test_a_broken_snapshot_is_one_of_our_errors() -> None:
    for data in (b"", b"{}", b"\xff", b'{"fleet": 3}', b"[" * 100_000):
        with pytest.raises(BadMessage):
            decode(data)


# --- whatever comes --------------------------------------------------------------------------

names = st.sampled_from(["A", "B", "C", COORDINATOR, ""])
runs = names.filter(bool)
numbers = st.one_of(st.integers(0, 9), st.integers(0, 2**62))
floats = st.floats()
short = st.text("abc[]{}✕", max_size=5)
bodies = st.one_of(
    st.builds(Presence, state=st.sampled_from(PeerState), reason=short, round=numbers, run=names),
    st.builds(Presence, state=st.just(PeerState.OFFLINE), will=st.just(True)),
    st.builds(
        Telemetry,
        run=names,
        loss=st.none() | floats,
        samples_per_s=floats,
        cpu_percent=floats,
        battery_percent=st.none() | floats,
        diverged=st.booleans(),
        step=numbers,
    ),
    st.builds(Notice, level=st.sampled_from(["info", "warning", "error"]), text=short),
    st.builds(Doorbell),
    st.builds(Command, action=st.just("pause")),
    st.builds(
        PeerChanged,
        peer=names,
        name=short,
        enrollment=st.sampled_from(["awaiting", "enrolled", "removed"]),
        public_key=st.sampled_from([KEY, b"n" * 32]),
    ),
    st.builds(
        RunChanged,
        run=runs,
        task=short,
        state=st.sampled_from(RunState),
        round=numbers,
        rounds=numbers,
        quorum=numbers,
    ),
    st.builds(
        RoundClosed,
        run=runs,
        round=numbers,
        digest=st.just("0" * 64),
        seconds=floats,
        peers=numbers,
        loss=st.none() | floats,
        accuracy=st.none() | floats,
        metrics=st.dictionaries(short, st.none() | floats, max_size=2),
        norms=st.dictionaries(names, floats, max_size=2),
    ),
    st.builds(EventLine, level=st.sampled_from(["info", "warning", "error"]), text=short),
    st.builds(Links, mqtt=st.booleans(), flower=st.booleans(), rejected=numbers),
)
envelopes = st.builds(
    Envelope,
    sender=names,
    epoch=st.sampled_from(["", "e1", "e2", "e3"]),
    seq=numbers,
    at=floats,
    body=bodies,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(envelopes, max_size=40))
def test_no_message_breaks_the_fold_or_the_snapshot(told: list[Envelope]) -> None:
    fleet, again = new_fleet("A", "B"), new_fleet("A", "B")
    for index, envelope in enumerate(told):
        reduce(fleet, envelope, NOW + index)
        reduce(again, envelope, NOW + index)
    assert fleet == again, "the same messages make the same fleet"
    assert decode(encode(fleet, NOW)) == fleet
    for peer in fleet.peers.values():
        shown_state(peer, NOW)
    current_run(fleet)


peer_bodies = st.one_of(
    st.builds(Presence, state=st.sampled_from(PeerState), reason=short),
    st.builds(Telemetry, loss=st.floats(0, 9), step=numbers),
)


@settings(deadline=None)
@given(st.lists(peer_bodies, min_size=1, max_size=12), st.randoms())
def test_order_and_duplicates_do_not_change_what_a_peer_is(told: list[Body], random: Any) -> None:
    in_order = [said("A", seq, body) for seq, body in enumerate(told, 1)]
    mixed = [*in_order, *in_order]
    random.shuffle(mixed)
    one, other = new_fleet("A"), new_fleet("A")
    for envelope in in_order:
        reduce(one, envelope, NOW)
    for envelope in mixed:
        reduce(other, envelope, NOW)
    a, b = one.peers["A"], other.peers["A"]
    assert (a.state, a.reason, a.telemetry, a.seq) == (b.state, b.reason, b.telemetry, b.seq)
    assert (len(one.peers), one.gap) == (len(other.peers), other.gap)


@settings(deadline=None)
@given(st.integers(1, 12), st.randoms())
def test_repeated_words_of_the_coordinator_count_once(count: int, random: Any) -> None:
    told = [said(COORDINATOR, 1, run_at(1))]
    told += [said(COORDINATOR, seq, closed(seq)) for seq in range(2, count + 2)]
    told += [said(COORDINATOR, count + 2, EventLine(level="info", text="done"))]
    repeated = [envelope for envelope in told for _ in range(random.randint(1, 3))]
    one, other = new_fleet(), new_fleet()
    for envelope in told:
        reduce(one, envelope, NOW)
    for envelope in repeated:
        reduce(other, envelope, NOW)
    assert one == other


def test_who_gave_an_update_is_kept_by_round_and_run() -> None:
    fleet = new_fleet("A", "B")
    reduce(fleet, said(COORDINATOR, 3, run_at(1)), NOW)
    reduce(fleet, said(COORDINATOR, 4, closed(1, peers=1, norms={"A": 1.0})), NOW)
    reduce(fleet, said(COORDINATOR, 5, closed(2, peers=300)), NOW)
    reduce(fleet, said(COORDINATOR, 6, closed(3, peers=2, norms={"A": 1.0, "B": 1.0})), NOW)
    assert [peer.contributions for peer in fleet.peers.values()] == ["1?1", "0?1"]
    reduce(fleet, said(COORDINATOR, 7, closed(3, peers=1, norms={"A": 1.0})), NOW)
    assert [peer.contributions for peer in fleet.peers.values()] == ["1?1", "0?0"]
    for number in range(4, 2 * fleets.MAX_CONTRIBUTIONS):
        reduce(fleet, said(COORDINATOR, number + 4, closed(number, peers=0)), NOW)
    assert {len(peer.contributions) for peer in fleet.peers.values()} == {fleets.MAX_CONTRIBUTIONS}
    assert decode(encode(fleet, NOW)) == fleet


def test_rounds_of_all_runs_are_bounded_and_the_oldest_go_first() -> None:
    fleet, seq = new_fleet(), 0
    for number in range(6):
        run = f"r{number}"
        seq += 1
        reduce(fleet, said(COORDINATOR, seq, run_at(1, run)), NOW)
        for round_ in range(500):
            seq += 1
            reduce(fleet, said(COORDINATOR, seq, closed(round_, run=run)), NOW)
    kept = [len(run.rounds) for run in fleet.runs.values()]
    assert sum(kept) == fleets.MAX_ROUNDS
    assert kept == [0, 500, 500, 500, 500, 500]
