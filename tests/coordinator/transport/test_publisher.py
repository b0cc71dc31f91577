"""What the coordinator publishes about peers whose MQTT presence is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.fleet.members import Peer
from coordinator.fleet.sessions import Sessions
from coordinator.fleet.state import Fleet
from coordinator.storage import settings
from coordinator.transport.publisher import EventPublisher
from protocols.enrollment import identity
from protocols.errors import Unreachable
from protocols.messages.envelope import Command, Presence
from protocols.messages.mqtt import SequencedSigner
from protocols.messages.states import PeerState


class Site:
    """A publisher, and one enrolled peer with a session that is open for a while."""

    def __init__(self, home: Path) -> None:
        self.sign_key = identity.new_signing_key()
        public = identity.public_bytes(self.sign_key)
        self.peer = Peer(
            peer=identity.peer_id(public),
            name="ada",
            labels={},
            standing="enrolled",
            sign_public=public,
            node_public=b"",
        )
        settings.init([])
        keys = settings.open_keys(home)
        self.fleet = Fleet(fleet=keys.fleet)
        self.sessions = Sessions(self.fleet)
        self.publisher = EventPublisher(self.fleet, self.sessions, keys)
        self.changes: list[None] = []
        self.publisher.on_eligibility_change = lambda: self.changes.append(None)
        self.sessions.add(self.peer.peer, 7)
        self.sessions.open(self.peer.peer)
        self.poll()
        self.publisher.publish_peer(self.peer)
        self._signer = SequencedSigner(self.peer.peer, self.sign_key.sign)

    @property
    def shown(self) -> tuple[PeerState, str]:
        peer = self.fleet.peers[self.peer.peer]
        return peer.state, peer.reason

    def poll(self, *, answered: bool = False, wants_work: bool = True, got_work: bool = False):
        self.sessions.on_request(self.peer.peer)
        self.sessions.on_poll(
            self.peer.peer, answered=answered, wants_work=wants_work, got_work=got_work
        )

    def hear(self, state: PeerState, reason: str = "") -> None:
        body = Presence(state=state, reason=reason)
        self.publisher._on_message("presence", self._signer.next_envelope(body))

    def look(self) -> int:
        """The number of events of one look at the peers."""
        before = self.fleet.seq
        self.publisher.publish_links([self.peer])
        return self.fleet.seq - before


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path))
    monkeypatch.setattr("coordinator.fleet.sessions.PRESENCE_GRACE_S", -1.0)
    return Site(tmp_path)


def test_a_peer_with_presence_costs_no_event_in_any_round(site: Site) -> None:
    site.publisher._on_link(True, "")
    site.hear(PeerState.IDLE)
    site.look()
    for _ in range(3):
        site.poll(got_work=True)
        assert site.look() == 0
        site.poll(answered=True)
        assert site.look() == 0
    assert site.shown == (PeerState.IDLE, "")


@pytest.mark.parametrize("link", [True, False])
def test_a_change_without_presence_is_one_event(site: Site, link: bool) -> None:
    site.publisher._on_link(link, "")
    site.look()
    missing = "MQTT presence missing"
    assert site.shown == (PeerState.IDLE, missing)
    site.poll(got_work=True)
    assert [site.look(), site.look()] == [1, 0]
    assert site.shown == (PeerState.TRAINING, missing)
    site.sessions.close(site.peer.peer)
    assert [site.look(), site.look()] == [2, 0], "the peer, and that none has a session"
    assert site.shown == (PeerState.OFFLINE, "session ended")


def test_a_resume_that_only_requests_show_wakes_the_runs(site: Site) -> None:
    site.publisher._on_link(True, "")
    site.hear(PeerState.PAUSED, "by its owner")
    site.look()
    assert not site.sessions.is_eligible(site.peer.peer)
    site.publisher._on_link(False, "gone")
    site.changes.clear()
    site.poll()
    site.look()
    assert site.changes
    assert site.sessions.is_eligible(site.peer.peer)
    site.publisher._on_link(True, "")
    site.hear(PeerState.PAUSED, "by its owner")
    site.look()
    assert site.shown == (PeerState.PAUSED, "by its owner")
    assert not site.sessions.is_eligible(site.peer.peer)


async def test_a_command_that_would_be_lost_is_refused(site: Site) -> None:
    sent: list[Command] = []

    class Broker:
        async def send_to(self, peer: str, command: Command) -> bool:
            sent.append(command)
            return True

    site.publisher._client = Broker()  # type: ignore[assignment]
    site.publisher._on_link(True, "")
    site.look()
    with pytest.raises(Unreachable, match="ada is not connected to the MQTT broker"):
        await site.publisher.command(site.peer.peer, Command(action="pause"))
    assert sent == []
    site.hear(PeerState.IDLE)
    await site.publisher.command(site.peer.peer, Command(action="pause"))
    assert sent == [Command(action="pause")]


async def test_a_command_waits_for_a_peer_after_the_broker_was_restarted(site: Site) -> None:
    """Before the peer subscribes again, the broker takes a command and drops it."""
    sent: list[Command] = []

    class Broker:
        async def send_to(self, peer: str, command: Command) -> bool:
            sent.append(command)
            return True

    site.publisher._client = Broker()  # type: ignore[assignment]
    site.publisher._on_link(True, "")
    site.hear(PeerState.IDLE)
    site.publisher._on_link(False, "the broker ended")
    site.publisher._on_link(True, "")
    command = asyncio.create_task(site.publisher.command(site.peer.peer, Command(action="pause")))
    await asyncio.sleep(0.3)
    assert sent == []
    site.hear(PeerState.IDLE)
    await command
    assert sent == [Command(action="pause")]


def test_a_broker_that_always_gives_another_reason_fills_neither_memory_nor_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1000):
        site.publisher._on_link(False, f"refused with {number}")
    assert 1 < len(caplog.records) < 100
    assert site.fleet.links.why == "refused with 999"
    caplog.clear()
    with caplog.at_level("INFO"):
        site.publisher._on_link(True, "")
        site.publisher._on_link(False, "refused with 999")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
