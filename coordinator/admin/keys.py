"""Rotation of the coordinator's keys while it is stopped, and what `keys status` shows.

The CA stays, so no machine joins again. At the next `up` the CA signs a fleet card with the new
signing key and a higher number. Agents replace the key at their next session, and refuse the older
card from then on.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from pathlib import Path
from typing import Literal

from msgspec import Struct

from coordinator.fleet.registry import Registry
from coordinator.storage import settings
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.ledger import Ledger
from protocols.enrollment import identity
from protocols.errors import HomeLocked
from protocols.local import homes
from protocols.local.atomic_files import write_private

KeyName = Literal["signing", "operator"]
FILES: dict[KeyName, str] = {"signing": "coordinator.key", "operator": "operator.key"}


class KeyStatus(Struct, frozen=True, kw_only=True):
    """The keys of a home: short hashes of the public ones, and the days left of the certificates.

    `card`: the number of the fleet card; 0 before the first `up`. `is_announced`: it has the
    current signing key.
    """

    fleet: str
    ca_days: float
    tls_days: float
    signing: str
    operator: str
    card: int
    is_announced: bool


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
    )


def rotate(home: Path, name: KeyName) -> str:
    """Replace this key by a new one; return its short hash. Raises HomeError, HomeLocked.

    The ledger records it first: a crash in between costs an entry, and never a silent change.
    """
    settings.open_keys(home)  # a damaged home is an error
    try:
        held = homes.lock_home(home, "coordinator")
    except HomeLocked as err:
        raise HomeLocked(
            f"the coordinator of {home} is running with its present keys",
            "stop it, rotate the key, then start it again: commonweight up",
        ) from err
    try:
        key = identity.new_signing_key()
        digest = short_hash(identity.public_bytes(key))
        ledger = Ledger(home / "ledger.db")
        try:
            Registry(ledger).record_key(name, digest)
        finally:
            ledger.close()
        write_private(home / FILES[name], identity.private_pem(key))
    finally:
        held.release()
    return digest
