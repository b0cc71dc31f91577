"""Who can be given work: by session, by what a peer says of itself, and by its hours."""

from __future__ import annotations

import time

import pytest

from coordinator.fleet.sessions import MAX_POLL_GAP_S, PRESENCE_GRACE_S, Sessions
from coordinator.fleet.state import Fleet, Peer
from protocols.messages.envelope import Presence
from protocols.messages.states import PeerState

PEER = "a1"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> tuple[Fleet, Sessions, list[float]]:
    """A fleet with one idle peer that has a session, and a clock to move."""
    fleet = Fleet(fleet="f")
    fleet.peers[PEER] = Peer(peer=PEER, name="ada", public_key=bytes(32), state=PeerState.IDLE)
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sessions = Sessions(fleet)
    sessions.add(PEER, 7)
    sessions.open(PEER)
    sessions.on_request(PEER)
    return fleet, sessions, clock


def says(fleet: Fleet, sessions: Sessions, state: PeerState, **more: float) -> None:
    presence = Presence(state=state, run="r", round=1, **more)  # type: ignore[arg-type]
    peer = fleet.peers[PEER]
    peer.state, peer.free_until = presence.state, presence.free_until
    sessions.on_presence(PEER, presence)


@pytest.mark.parametrize("state", [PeerState.PAUSED, PeerState.ERROR])
def test_a_paused_peer_is_not_chosen(
    site: tuple[Fleet, Sessions, list[float]], state: PeerState
) -> None:
    fleet, sessions, _ = site
    assert sessions.eligible() == {PEER}
    says(fleet, sessions, state)
    assert sessions.eligible() == frozenset()


def test_work_goes_to_those_who_can_end_it_in_their_hours(
    site: tuple[Fleet, Sessions, list[float]],
) -> None:
    fleet, sessions, clock = site
    says(fleet, sessions, PeerState.TRAINING)
    clock[0] += 100
    says(fleet, sessions, PeerState.PAUSED)  # a pause in it counts: it takes as long as it takes
    clock[0] += 100
    says(fleet, sessions, PeerState.TRAINING)
    clock[0] += 100
    says(fleet, sessions, PeerState.SENDING)
    assert sessions.is_eligible(PEER)
    says(fleet, sessions, PeerState.IDLE, free_until=time.time() + 400)
    assert sessions.is_eligible(PEER)
    says(fleet, sessions, PeerState.IDLE, free_until=time.time() + 200)
    assert not sessions.is_eligible(PEER)
    says(fleet, sessions, PeerState.TRAINING, free_until=time.time() + 200)
    assert sessions.is_eligible(PEER), "what is begun is not taken away"


def test_requests_show_what_a_peer_does_when_its_presence_is_missing(
    site: tuple[Fleet, Sessions, list[float]],
) -> None:
    fleet, sessions, clock = site

    def poll(*, answered: bool = False, wants_work: bool = True, got_work: bool = False) -> None:
        sessions.on_request(PEER)
        sessions.on_poll(PEER, answered=answered, wants_work=wants_work, got_work=got_work)

    def shown() -> PeerState | None:
        return sessions.state_from_requests(PEER)

    heartbeat = {"wants_work": False}
    poll(**heartbeat)
    assert shown() is PeerState.IDLE, "unknown: it may be in work of an earlier session"
    poll(got_work=True)
    for _ in range(10):
        clock[0] += 20
        poll(**heartbeat)
    assert shown() is PeerState.TRAINING
    poll(answered=True)
    assert shown() is PeerState.IDLE
    clock[0] += MAX_POLL_GAP_S
    poll(**heartbeat)
    assert shown() is PeerState.IDLE
    clock[0] += 1
    assert shown() is PeerState.PAUSED, "it is there, and asks for no work"
    poll(got_work=True)
    poll(answered=True, wants_work=False)
    assert shown() is PeerState.PAUSED, "it has paused during its work"
    clock[0] += 1
    says(fleet, sessions, PeerState.OFFLINE)
    assert shown() is None
    assert not sessions.is_eligible(PEER)
    poll()
    assert shown() is PeerState.IDLE, "a request after it proves the contrary"
    sessions.close(PEER)
    assert shown() is None


def test_presence_has_some_time_to_arrive(site: tuple[Fleet, Sessions, list[float]]) -> None:
    _, sessions, clock = site
    assert not sessions.presence_is_due(PEER)
    clock[0] += PRESENCE_GRACE_S + 1
    assert sessions.presence_is_due(PEER)
    sessions.on_presence(PEER, Presence(state=PeerState.OFFLINE, will=True))
    assert not sessions.presence_is_due(PEER)


def test_a_peer_that_has_not_worked_yet_is_given_the_benefit_of_the_doubt(
    site: tuple[Fleet, Sessions, list[float]],
) -> None:
    fleet, sessions, _ = site
    says(fleet, sessions, PeerState.IDLE, free_until=time.time() + 5)
    assert sessions.is_eligible(PEER)
    says(fleet, sessions, PeerState.IDLE, free_until=time.time() - 5)
    assert not sessions.is_eligible(PEER)
