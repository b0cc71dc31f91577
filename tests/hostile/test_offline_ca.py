"""A CA whose key is offline: an issuer signs in its place, and nobody else does."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from coordinator.admin import backup, keys
from coordinator.storage import settings
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import certificates, fleet_card, identity
from protocols.enrollment.certificates import NodeCertificate
from protocols.enrollment.fleet_card import BrokerCard, FleetCard
from protocols.errors import BadMessage, UsageError
from protocols.messages.mqtt import MqttAddress
from tests.support.fleet_harness import fleet

pytestmark = pytest.mark.attack("20.keys")

PASSPHRASE = "correct horse battery"
BROKER = MqttAddress(host="", port=1883)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    keep = keys.write_encrypted(tmp_path / "ca.key", PASSPHRASE)
    return settings.init(["localhost"], keep)[0]


def certificate(ca_pem: bytes, **changed: Any) -> NodeCertificate:
    public = identity.public_bytes(identity.new_signing_key())
    fields: dict[str, Any] = {
        "fleet": certificates.fleet_id(ca_pem),
        "peer": identity.peer_id(public),
        "name": "box",
        "sign_public": public,
        "node_public": identity.node_public_pem(identity.new_node_key()),
        "not_after": time.time() + 60,
    }
    return NodeCertificate(**(fields | changed))


def card(ca_pem: bytes, issuer: bytes) -> FleetCard:
    return FleetCard(
        fleet=certificates.fleet_id(ca_pem),
        counter=2**50,
        coordinator_public=bytes(32),
        broker=BrokerCard(port=1),
        issuer=issuer,
    )


@pytest.mark.attack("20.keys")
def test_the_home_has_no_ca_key(home: Path, tmp_path: Path) -> None:
    """Attack: whoever reads the coordinator's home signs as the CA for ever."""
    ca = certificates.ca_public(settings.open_keys(home).ca_pem)
    for path in home.rglob("*"):
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes():
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            assert not (
                isinstance(key, identity.SigningKey) and identity.public_bytes(key) == ca
            ), path
    stored = tmp_path / "ca.key"
    assert stored.stat().st_mode & 0o077 == 0
    assert b"ENCRYPTED" in stored.read_bytes()
    with pytest.raises(TypeError):
        serialization.load_pem_private_key(stored.read_bytes(), None)


@pytest.mark.attack("20.keys")
@pytest.mark.parametrize("kind", ["own", "leaf", "under", "spliced"])
def test_nobody_makes_an_issuer_of_his_own(home: Path, kind: str) -> None:
    """Attack: a certificate or card names an issuer that the CA did not make as one."""
    found = settings.open_keys(home)
    ca_pem, key = found.ca_pem, identity.new_signing_key()
    if kind == "own":
        key, issuer = certificates.new_issuer(*certificates.new_ca("commonweight"))
    elif kind == "under":  # an issuer that our issuer made
        key, issuer = certificates.new_issuer(found.ca_key, found.issuer)
    elif kind == "leaf":
        issuer = (home / "server.pem").read_bytes().partition(found.issuer)[0]
    else:
        issuer = found.issuer
    with pytest.raises(BadMessage):
        certificates.verify_certificate(
            ca_pem, certificates.issue_certificate(key, certificate(ca_pem, issuer=issuer))
        )
    with pytest.raises(BadMessage):
        fleet_card.verify_card(ca_pem, fleet_card.issue_card(key, card(ca_pem, issuer)))
    for both in (found.issuer + issuer, issuer + found.issuer):
        with pytest.raises(BadMessage):
            certificates.signer_public(ca_pem, both)


def test_the_issuer_signs_peers_cards_and_tls(home: Path) -> None:
    """Control: the issuer signs peers, fleet cards and TLS certificates."""
    found = settings.open_keys(home)
    made = certificate(found.ca_pem, issuer=found.issuer)
    signed = certificates.issue_certificate(found.ca_key, made)
    assert certificates.verify_certificate(found.ca_pem, signed) == made
    public = identity.public_bytes(found.sign_key)
    stored = CardFile(home, found.ca_pem)
    told = stored.current(found.ca_key, public, BROKER, found.issuer)
    assert fleet_card.verify_card(found.ca_pem, told).issuer == found.issuer
    context = ssl.create_default_context(cadata=found.ca_pem.decode())
    assert len(context.get_ca_certs()) == 1
    assert not settings.certify(home, found.ca_key, found.ca_pem, ["localhost"], found.issuer)


@pytest.mark.attack("20.keys")
def test_a_replaced_issuer_makes_no_card(home: Path, tmp_path: Path) -> None:
    """Attack: whoever stole the issuer's key makes a card with a high number after its rotation."""
    old = settings.open_keys(home)
    with pytest.raises(UsageError, match="cannot open"):
        keys.rotate_issuer(home, tmp_path / "ca.key", "wrong horse battery")
    other = tmp_path / "other.key"
    keys.write_encrypted(other, PASSPHRASE)(identity.new_signing_key())
    with pytest.raises(UsageError, match="not the key of this fleet's CA"):
        keys.rotate_issuer(home, other, PASSPHRASE)
    assert settings.open_keys(home).issuer == old.issuer
    time.sleep(1.1)  # certificates count whole seconds
    keys.rotate_issuer(home, tmp_path / "ca.key", PASSPHRASE)
    new = settings.open_keys(home)
    assert new.issuer != old.issuer
    assert settings.certify(home, new.ca_key, new.ca_pem, ["localhost"], new.issuer)
    public = identity.public_bytes(new.sign_key)
    known = CardFile(home, new.ca_pem).current(new.ca_key, public, BROKER, new.issuer)
    forged = fleet_card.issue_card(old.ca_key, card(new.ca_pem, old.issuer))
    with pytest.raises(BadMessage, match="was replaced"):
        fleet_card.verify_card(new.ca_pem, forged, newer_than=known)


def test_a_passphrase_has_a_length_and_no_file_is_overwritten(tmp_path: Path) -> None:
    """Control: a short passphrase and an existing file are refused."""
    with pytest.raises(UsageError, match="12 characters"):
        keys.write_encrypted(tmp_path / "ca.key", "short")
    (tmp_path / "ca.key").write_text("x")
    with pytest.raises(UsageError, match="exists"):
        keys.write_encrypted(tmp_path / "ca.key", PASSPHRASE)


def test_a_backup_has_the_issuer(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Control: a backup has the issuer."""
    SqliteLedger(home / "ledger.db").close()
    backup.write(home, tmp_path / "saved", with_versions=False)
    before = settings.open_keys(home)
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "again"))
    backup.restore(tmp_path / "saved", tmp_path / "again", from_peers=False)
    after = settings.open_keys(tmp_path / "again")
    assert (after.fleet, after.issuer) == (before.fleet, before.issuer)


@pytest.mark.long
def test_a_fleet_works_with_an_offline_ca(tmp_path: Path) -> None:
    """Control: a fleet whose CA is offline joins, trains and passes its checks."""
    (tmp_path / "word").write_text(PASSPHRASE + "\n")
    with fleet(tmp_path) as site:
        word = ("--passphrase-file", str(tmp_path / "word"))
        site.data("init", "--offline-ca", str(tmp_path / "ca.key"), *word)
        assert not (site.home / "ca.key").exists()
        site.up()
        site.join("ada")
        site.start("ada")
        run = site.ended_run(site.start_run("ping", "--rounds", "1", "--quorum", "1"))
        assert run["state"] == "finished"
        checks = site.ask_agent("ada", "doctor")
        assert checks.returncode == 0, checks.stdout
