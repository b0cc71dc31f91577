"""Rotation of the coordinator's keys while it is stopped, and what `keys status` shows.

The CA stays, so no machine joins again. At the next `up` the CA signs a fleet card with the new
signing key and a higher number. Agents replace the key at their next session, and refuse the older
card from then on.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from msgspec import Struct

from coordinator.fleet.registry import Registry
from coordinator.storage import settings
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.ledger import Ledger
from coordinator.storage.settings import ISSUER_FILE
from protocols.enrollment import identity
from protocols.enrollment.identity import SigningKey
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.atomic_files import write_private

KeyName = Literal["signing", "operator"]
FILES: dict[KeyName, str] = {"signing": "coordinator.key", "operator": "operator.key"}
MIN_PASSPHRASE = 12


class KeyStatus(Struct, frozen=True, kw_only=True):
    """The keys of a home: short hashes of the public ones, and the days left of the certificates.

    `card`: the number of the fleet card; 0 before the first `up`. `is_announced`: it has the
    current signing key. `issuer_days`: of the issuer's certificate, if the CA's key is offline.
    """

    fleet: str
    ca_days: float
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
    card = CardFile(home, keys.ca_pem).card
    now = datetime.datetime.now(datetime.UTC)
    tls_days = 0.0
    with contextlib.suppress(OSError, ValueError):  # `up` makes one
        tls_days = identity.days_left((home / "server.pem").read_bytes(), now)
    return KeyStatus(
        fleet=keys.fleet,
        ca_days=identity.days_left(keys.ca_pem, now),
        tls_days=tls_days,
        signing=short_hash(public),
        operator=short_hash(identity.public_bytes(keys.operator_key)),
        card=card.counter if card else 0,
        is_announced=card is not None and card.coordinator_public == public,
        issuer_days=identity.days_left(keys.issuer, now) if keys.issuer else None,
    )


def rotate(home: Path, name: KeyName) -> str:
    """Replace this key by a new one; return its short hash. Raises HomeError, HomeLocked."""
    key = identity.new_signing_key()
    digest = short_hash(identity.public_bytes(key))
    with _recorded(home, name, digest):
        write_private(home / FILES[name], identity.private_pem(key))
    return digest


def rotate_issuer(home: Path, ca_file: Path, passphrase: str) -> str:
    """Replace the issuer, with the CA's key in `ca_file`; return its short hash.

    Raises UsageError (wrong file or passphrase), HomeError, HomeLocked.
    """
    keys = settings.open_keys(home)
    if not keys.issuer:
        raise UsageError(
            "the CA's key of this home is not offline, so it has no issuer",
            "only a fleet made with commonweight init --offline-ca has one",
        )
    try:
        ca_key = serialization.load_pem_private_key(ca_file.read_bytes(), passphrase.encode())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise UsageError(f"cannot open {ca_file}: {err}", "is it the passphrase of init?") from err
    if not isinstance(ca_key, SigningKey) or identity.public_bytes(ca_key) != identity.ca_public(
        keys.ca_pem
    ):
        raise UsageError(f"{ca_file} is not the key of this fleet's CA, {keys.fleet}")
    key, issuer = identity.new_issuer(ca_key, keys.ca_pem)
    digest = short_hash(identity.public_bytes(key))
    with _recorded(home, "issuer", digest):
        write_private(home / ISSUER_FILE, issuer + identity.private_pem(key))
    return digest


def write_encrypted(file: Path, passphrase: str) -> Callable[[SigningKey], None]:
    """A function that writes a CA key to a new `file`, encrypted. Raises UsageError."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise UsageError(f"the passphrase must have at least {MIN_PASSPHRASE} characters")
    if file.exists():
        raise UsageError(f"{file} exists already", "choose another name for the CA's key")

    def write(key: SigningKey) -> None:
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase.encode()),
        )
        try:
            write_private(file, pem)
        except OSError as err:
            raise UsageError(f"cannot write {file}: {err.strerror or err}") from err

    return write


@contextlib.contextmanager
def _recorded(home: Path, name: str, digest: str) -> Iterator[None]:
    """Lock the stopped coordinator's home, and record the new key in the ledger.

    The ledger comes first: a crash in between costs an entry, and is never a silent change.
    """
    settings.open_keys(home)  # a damaged home is an error
    with homes.hold(
        home,
        f"the coordinator of {home} is running with its present keys",
        "stop it, rotate the key, then start it again: commonweight up",
    ):
        ledger = Ledger(home / "ledger.db")
        try:
            Registry(ledger).record_key(name, digest)
        finally:
            ledger.close()
        yield
