"""Rotation of the coordinator's keys while it is stopped, and what `keys status` shows.

No machine joins again. At the next `up` the CA signs a fleet card with the new signing key and a
higher number; agents replace the key at their next session, and refuse the older card from then on.
A new CA is signed by the old one (`protocols.enrollment.ca_chain`), and the fleet keeps its id.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from msgspec import Struct

from coordinator.fleet.registry import Registry
from coordinator.storage import ca_files, ledger_place, settings
from coordinator.storage.ca_files import ISSUER_FILE, CaFiles
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.settings import Keys
from protocols.enrollment import ca_chain, certificates, identity
from protocols.enrollment.identity import SigningKey
from protocols.enrollment.joining import MAX_TRANSITIONS
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.atomic_files import write_private
from protocols.local.os_errors import os_errors_as

KeyName = Literal["signing", "operator"]
FILES: dict[KeyName, str] = {"signing": "coordinator.key", "operator": "operator.key"}
MIN_PASSPHRASE = 12


class KeyStatus(Struct, frozen=True, kw_only=True):
    """The keys of a home: short hashes of the public ones, and the days left of the certificates.

    `card`: the number of the fleet card; 0 before the first `up`. `is_announced`: it has the
    current signing key. `issuer_days`: of the issuer's certificate, if the CA's key is offline.
    `ca_rotations`: how often the CA was replaced. `behind`: names of the machines and accesses that
    have not come since the last time. `old_ca_until`: until when (Unix s) certificates of the CA
    before count; 0 if they do not.
    """

    fleet: str
    ca: str
    ca_days: float
    ca_rotations: int
    behind: list[str]
    old_ca_until: float
    tls_days: float
    signing: str
    operator: str
    card: int
    is_announced: bool
    issuer_days: float | None = None


def short_hash(public: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a public key."""
    return hashlib.sha256(public).hexdigest()[:16]


def read_status(home: Path) -> KeyStatus:
    """The status of the keys in `home`. Raises HomeError."""
    keys = settings.open_keys(home)
    public = identity.public_bytes(keys.sign_key)
    card = CardFile(home, keys.ca_pem, keys.chain).card
    now = datetime.datetime.now(datetime.UTC)
    tls_days = 0.0
    with contextlib.suppress(OSError, ValueError):  # `up` makes one
        tls_days = certificates.days_left((home / "server.pem").read_bytes(), now)
    steps = ca_chain.read_chain(keys.chain)
    behind, peers_behind = _read_behind(home) if steps else ([], False)
    return KeyStatus(
        fleet=keys.fleet,
        ca=certificates.ca_fingerprint(keys.ca_pem).hex()[:16],
        ca_days=certificates.days_left(keys.ca_pem, now),
        ca_rotations=len(steps),
        behind=behind,
        old_ca_until=steps[-1].old_until if peers_behind else 0.0,
        tls_days=tls_days,
        signing=short_hash(public),
        operator=short_hash(identity.public_bytes(keys.operator_key)),
        card=card.counter if card else 0,
        is_announced=card is not None and card.coordinator_public == public,
        issuer_days=certificates.days_left(keys.issuer, now) if keys.issuer else None,
    )


def _read_behind(home: Path) -> tuple[list[str], bool]:
    """The names of members that are behind, and whether a peer is among them."""
    with ledger_place.reading(home) as ledger:
        known = Registry(ledger)
    peers = [known.peers[one].name for one in known.behind if one in known.peers]
    others = [known.operators[one].name for one in known.behind if one in known.operators]
    return sorted(peers) + sorted(others), bool(peers)


def rotate(home: Path, name: KeyName) -> str:
    """Replace this key by a new one; return its short hash. Raises HomeError, HomeLocked."""
    key = identity.new_signing_key()
    digest = short_hash(identity.public_bytes(key))
    with _locked(home):
        _record(home, name, digest)
        write_private(home / FILES[name], identity.private_pem(key))
    return digest


def rotate_issuer(home: Path, ca_file: Path, passphrase: str) -> str:
    """Replace the issuer, with the CA's key in `ca_file`; return its short hash.

    Raises UsageError (wrong file or passphrase), HomeError, HomeLocked.
    """
    with _locked(home) as keys:
        check_issuer(keys, has_ca_key=True)
        ca_key = _open_ca_key(keys, ca_file, passphrase)
        key, issuer = certificates.new_issuer(ca_key, keys.ca_pem)
        digest = short_hash(identity.public_bytes(key))
        _record(home, "issuer", digest)
        write_private(home / ISSUER_FILE, issuer + identity.private_pem(key))
    return digest


def check_issuer(keys: Keys, *, has_ca_key: bool) -> None:
    """Raise UsageError unless `rotate_issuer` can replace the issuer of these keys."""
    if not keys.issuer:
        raise UsageError(
            "the CA's key of this home is not offline, so it has no issuer",
            "take it offline: commonweight admin keys rotate ca --offline-ca FILE",
        )
    if not has_ca_key:
        raise UsageError(
            "the CA's key signs a new issuer", "--ca-key FILE, as given to --offline-ca"
        )


def rotate_ca(
    home: Path,
    *,
    old: tuple[Path, str] | None = None,
    keep_offline: Callable[[SigningKey], None] | None = None,
    old_days: float = ca_chain.OLD_CA_DAYS,
) -> str:
    """Replace the CA by a new one, which the old one signs; return its short hash.

    `old`: file and passphrase of the old CA's key, if it is offline. `keep_offline` stores the new
    CA's key elsewhere. `old_days`: how long certificates of the old CA count, unless all peers have
    new ones before. Raises UsageError, HomeError, HomeLocked.
    """
    if not 0 <= old_days <= ca_chain.MAX_OLD_CA_DAYS:
        raise UsageError(
            f"certificates of the old CA cannot count for {old_days:g} days",
            f"--old-days is from 0 to {ca_chain.MAX_OLD_CA_DAYS:g}",
        )
    with _locked(home) as keys:
        check_ca_options(keys, has_old=old is not None, is_offline=keep_offline is not None)
        old_key = _open_ca_key(keys, *old) if old else keys.ca_key
        key, ca_pem = certificates.new_ca(
            socket.gethostname(), with_issuers=keep_offline is not None
        )
        now = time.time()
        step = ca_chain.Transition(
            fleet=keys.fleet,
            counter=len(keys.chain) + 1,
            old_ca=keys.ca_pem,
            new_ca=ca_pem,
            at=now,
            old_until=now + old_days * 86400,
        )
        chain = (*keys.chain, ca_chain.sign_transition(old_key, step))
        signer = identity.private_pem(key)
        if keep_offline is not None:
            issuer_key, issuer = certificates.new_issuer(key, ca_pem)
            signer = issuer + identity.private_pem(issuer_key)
            keep_offline(key)
        digest = certificates.ca_fingerprint(ca_pem).hex()[:16]
        _record(home, "ca", digest)
        new = CaFiles(
            ca_pem=ca_pem, chain=chain, signer=signer, is_offline=keep_offline is not None
        )
        ca_files.replace(home, new)
    return digest


def check_ca_options(keys: Keys, *, has_old: bool, is_offline: bool) -> None:
    """Raise UsageError unless these options of `rotate_ca` fit to the present CA."""
    if keys.issuer and not has_old:
        raise UsageError(
            "the old CA's key is offline, and it has to sign the new CA",
            "--ca-key FILE, as given to commonweight init --offline-ca",
        )
    if keys.issuer and not is_offline:
        raise UsageError(
            "the CA's key of this fleet is offline, so the new key needs a file, too",
            "--offline-ca FILE, with a name that is not taken",
        )
    if has_old and not keys.issuer:
        raise UsageError("the old CA's key is in this home", "leave out --ca-key")
    if len(keys.chain) >= MAX_TRANSITIONS:
        raise UsageError(
            f"the CA was replaced {len(keys.chain)} times already, which is the limit",
            "create another fleet: set COMMONWEIGHT_HOME, then commonweight init",
        )


def _open_ca_key(keys: Keys, file: Path, passphrase: str) -> SigningKey:
    """The key of this home's CA from an encrypted file. Raises UsageError."""
    hint = "--ca-key names the file that init or keys rotate wrote by --offline-ca"
    with os_errors_as(UsageError, f"cannot open {file}", hint):
        data = file.read_bytes()
    if b"ENCRYPTED PRIVATE KEY" not in data:
        raise UsageError(f"cannot open {file}: it has no encrypted key", hint)
    try:
        key = serialization.load_pem_private_key(data, passphrase.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise UsageError(
            f"cannot open {file} with this passphrase", "each file has its own, chosen with it"
        ) from err
    if not isinstance(key, SigningKey) or identity.public_bytes(key) != certificates.ca_public(
        keys.ca_pem
    ):
        raise UsageError(f"{file} is not the key of this fleet's CA, {keys.fleet}", hint)
    return key


def write_encrypted(file: Path, passphrase: str) -> Callable[[SigningKey], None]:
    """A function that writes a CA key to a new `file`, encrypted. Raises UsageError."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise UsageError(
            f"the passphrase must have at least {MIN_PASSPHRASE} characters", "use some words"
        )
    if file.exists():
        raise UsageError(f"{file} exists already", "choose another name for the CA's key")
    if file.resolve().is_relative_to(homes.home_path("coordinator").resolve()):
        raise UsageError(
            f"{file} is in the coordinator's home, which a thief would copy",
            "choose a file elsewhere, best on a disk that you put away",
        )

    def write(key: SigningKey) -> None:
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase.encode()),
        )
        with os_errors_as(
            UsageError,
            f"cannot write {file}",
            "choose a file in a folder that exists and that you can write to",
        ):
            write_private(file, pem)

    return write


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[Keys]:
    """Lock the stopped coordinator's home, and open its keys. Raises HomeError, HomeLocked."""
    with homes.hold(
        home,
        f"the coordinator of {home} is running with its present keys",
        "stop it, rotate the key, then start it again: commonweight up",
    ):
        ca_files.finish_rotation(home)
        yield settings.open_keys(home)


def _record(home: Path, name: str, digest: str) -> None:
    """Record a new key in the ledger.

    The ledger comes first: a crash in between costs an entry, and is never a silent change.
    """
    with contextlib.closing(ledger_place.open_ledger(home)) as ledger:
        Registry(ledger).record_key(name, digest)
