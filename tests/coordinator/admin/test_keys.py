"""Rotation of keys in a stopped coordinator's home."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.admin import audit, keys
from coordinator.storage import ledger_place, settings
from coordinator.storage.fleet_cards import CardFile
from protocols.enrollment import fleet_card, identity
from protocols.errors import HomeLocked
from protocols.local import homes
from protocols.messages.mqtt import MqttAddress

BROKER = MqttAddress(host="", port=1883)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    return settings.init(["localhost"])[0]


def announce(home: Path) -> fleet_card.FleetCard:
    """The card that `up` makes."""
    found = settings.open_keys(home)
    public = identity.public_bytes(found.sign_key)
    signed = CardFile(home, found.ca_pem).current(found.ca_key, public, BROKER)
    return fleet_card.verify_card(found.ca_pem, signed)


@pytest.mark.attack("20.keys")
def test_a_rotated_signing_key_gets_a_newer_card(home: Path) -> None:
    """Attack: whoever has a leaked signing key goes on with it after the rotation."""
    before, old = settings.open_keys(home), announce(home)
    assert keys.read_status(home).is_announced
    digest = keys.rotate(home, "signing")
    status = keys.read_status(home)
    assert (status.signing, status.is_announced) == (digest, False)
    new = announce(home)
    assert new.counter > old.counter
    after = settings.open_keys(home)
    assert new.coordinator_public == identity.public_bytes(after.sign_key)
    assert new.coordinator_public != old.coordinator_public
    assert (after.fleet, after.ca_pem) == (before.fleet, before.ca_pem), "nobody joins again"
    assert keys.read_status(home).is_announced
    signed = [fleet_card.issue_card(before.ca_key, card) for card in (old, new)]
    with pytest.raises(Exception, match="older"):
        fleet_card.verify_card(after.ca_pem, signed[0], newer_than=signed[1])


def test_a_rotation_is_in_the_audit(home: Path) -> None:
    digest = keys.rotate(home, "operator")
    assert keys.read_status(home).operator == digest
    with ledger_place.reading(home) as ledger:
        entries = audit.read_audit(ledger)
    assert [entry.text for entry in entries] == [f"the operator key was replaced by {digest}"]
    assert (home / "operator.key").stat().st_mode & 0o077 == 0


def test_a_running_coordinator_keeps_its_keys(home: Path) -> None:
    held, before = homes.lock_home(home, "coordinator"), keys.read_status(home).signing
    with pytest.raises(HomeLocked, match="is running") as caught:
        keys.rotate(home, "signing")
    assert "commonweight up" in caught.value.hint
    assert keys.read_status(home).signing == before
    held.release()
    keys.rotate(home, "signing")
