"""A home restored from a backup has forgotten charges, and its own statements show it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.clientapp.privacy_budget import PrivacyBudget
from agent.home.privacy_ledger import Charge, Limit, PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.transport.charged_heads import ChargedHeads
from coordinator.fleet.fleet_events import PeerJoined
from coordinator.fleet.registry import Registry
from coordinator.fleet.witnesses import Witnesses
from coordinator.storage.seen_heads import SeenHeads
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.version_log import VersionLog
from protocols.enrollment import identity
from protocols.errors import NotAllowed
from protocols.messages.work import SIGNED_CHARGED, ChargedHead, Work
from protocols.privacy.events import Gaussian
from protocols.privacy.private_training import PrivateTraining

pytestmark = pytest.mark.attack("3", by="coordinator")
NO_LIMIT = Limit(0.0, 1e-5)
STRANGER = identity.new_signing_key()


class Scene:
    """A coordinator that keeps statements, and a peer whose home can be copied back."""

    def __init__(self, folder: Path) -> None:
        self.file, self.backup = folder / "told" / "privacy.db", folder / "backup.db"
        self.key = identity.new_signing_key()
        public = identity.public_bytes(self.key)
        self.peer = identity.peer_id(public)
        ledger, sign_key = SqliteLedger(folder / "ledger.db"), identity.new_signing_key()
        registry = Registry(ledger)
        registry._record(
            PeerJoined(
                peer=self.peer,
                name="ada",
                labels={},
                sign_public=public,
                node_public=b"",
                standing="enrolled",
            )
        )
        self.seen = SeenHeads(folder)
        self.witnesses = Witnesses(
            self.seen,
            VersionLog(ledger, "f", sign_key.sign),
            ledger,
            registry,
            identity.public_bytes(sign_key),
        )
        self.notes: list[str] = []
        self.start()

    def start(self) -> None:
        """Start the agent over its home."""
        self.heads = ChargedHeads(self.file, self.peer, self.key, self.notes.append)

    def charge(self) -> None:
        told = (Gaussian(5.0),)
        PrivacyLedger(self.file).charge(Charge("training", "r", told), NO_LIMIT)

    def poll(self) -> None:
        if statement := self.heads.statement():
            answer = self.witnesses.exchange_charged(self.peer, statement)
            if answer:
                self.heads.take(answer)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.seen.close()


def test_a_restored_home_charges_nothing_until_its_owner_has_confirmed(scene: Scene) -> None:
    """Attack: spend a budget again after its owner has restored the home from a backup."""
    scene.charge()
    scene.poll()
    shutil.copy(scene.file, scene.backup)
    scene.charge()
    scene.charge()
    scene.poll()
    assert scene.notes == []
    shutil.copy(scene.backup, scene.file)
    scene.start()
    scene.poll()
    assert "lacks 2 of its 3 entries, as after a restore" in scene.notes[0]
    budget = PrivacyBudget(scene.file, AgentSettings)
    work = Work(
        run="q",
        round=1,
        kind="train",
        task="mnist",
        settings=PrivateTraining(3.0, 1e-5, 1.0, 3).settings(),
    )
    with pytest.raises(NotAllowed, match="lacks 2 of its 3") as caught:
        budget.check(work)  # before an hour of training
    assert "commonweight-agent budget --restored" in caught.value.hint
    with pytest.raises(NotAllowed, match="lacks 2 of its 3"):
        scene.charge()
    # A restart forgets it no more than a ledger that is moved away.
    scene.file.unlink()
    scene.start()
    scene.poll()
    ledger = PrivacyLedger(scene.file)
    assert ledger.num_missing() == 3
    assert ledger.confirm_loss() == 3
    budget = PrivacyBudget(scene.file, AgentSettings)
    budget.check(work)
    scene.charge()
    scene.poll()
    assert (ledger.head(), ledger.num_missing(), ledger.confirm_loss()) == (4, 0, 0)


def test_a_coordinator_cannot_invent_charges(scene: Scene) -> None:
    """Attack: state more charges for a peer than it has, so that it refuses all work with noise."""
    scene.charge()
    other = ChargedHead(identity.peer_id(identity.public_bytes(STRANGER)), 9)
    for data in (
        SIGNED_CHARGED.pack(ChargedHead(scene.peer, 9), STRANGER.sign),
        SIGNED_CHARGED.pack(other, scene.key.sign),
        b"",
        b"\0" * 100,
    ):
        scene.heads.take(data)
    assert scene.notes == []
    assert PrivacyLedger(scene.file).num_missing() == 0
    scene.charge()


@pytest.mark.attack("3", by="peer")
def test_a_peer_cannot_state_charges_of_another(scene: Scene) -> None:
    """Attack: send another peer's key a statement that its home seems to be restored."""
    scene.poll()
    for data in (
        SIGNED_CHARGED.pack(ChargedHead(scene.peer, 9), STRANGER.sign),
        SIGNED_CHARGED.pack(ChargedHead("x", 9), scene.key.sign),
        b"\0" * 100,
    ):
        assert scene.witnesses.exchange_charged(scene.peer, data) == b""
    own = SIGNED_CHARGED.pack(ChargedHead(scene.peer, 0), scene.key.sign)
    assert scene.witnesses.exchange_charged(scene.peer, own) == b""
    assert scene.witnesses.exchange_charged("unknown", own) == b""


def test_nothing_is_stated_twice_and_no_file_is_made_for_it(scene: Scene) -> None:
    """Control: an agent without charges states none, and each number is stated once a session."""
    assert scene.heads.statement()
    assert scene.heads.statement() == b""
    assert not scene.file.exists()
    scene.heads.reset()
    assert scene.heads.statement()
    scene.charge()
    assert scene.heads.statement()
    assert scene.heads.statement() == b""
