"""The key of the noise of the round that closes now: 32 bytes, in the file `noise.key`, 0600.

It is on disk before a version with its noise exists, so a round that is closed again after a crash
gives the same version. It is in no backup, answer or log, and is deleted once the version is
committed: anyone who has it could subtract the noise.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

import msgspec

from coordinator.storage.run_events import Update
from protocols.local.atomic_files import fsync_folder, write_private

FILE = "noise.key"
_KEY_BYTES = 32


def fix(home: Path) -> bytes:
    """The key of the round that closes now; a new one if there is none. Raises OSError."""
    path = home / FILE
    if path.exists() and len(key := path.read_bytes()) == _KEY_BYTES:
        return key
    key = secrets.token_bytes(_KEY_BYTES)
    write_private(path, key)
    return key


def forget(home: Path) -> None:
    """Delete the key: the version of its round is committed."""
    if (home / FILE).exists():
        (home / FILE).unlink()
        fsync_folder(home)


def of_round(
    key: bytes, run: str, number: int, base: str, asked: int, updates: list[tuple[str, Update]]
) -> bytes:
    """The key for exactly these updates on this base.

    Two rounds must never share noise, or their difference would show the updates. So a key that is
    left from another round, or comes back with a restored disk, gives other noise.
    """
    digests = [(peer, update.digest) for peer, update in updates]
    text = msgspec.json.encode(("commonweight noise 1", run, number, base, asked, digests))
    return hmac.digest(key, text, hashlib.sha256)
