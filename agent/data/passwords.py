"""The password of the owner's database: from the environment, or from the system's keyring."""

from __future__ import annotations

import logging
import os

from agent.data import sources
from agent.data.sources import KEYRING, PASSWORD, Source

log = logging.getLogger("commonweight.data")


def password_of(source: Source) -> str:
    """Empty if none is set: the database may need none, or its driver may know it (~/.pgpass)."""
    if found := os.environ.get(PASSWORD):
        return found
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return ""
    try:
        return keyring.get_password(KEYRING, source.address) or ""
    except (KeyringError, OSError) as err:
        log.info("the keyring cannot be read: %s", err)
        return ""


def environment(path: str) -> dict[str, str]:
    """The variable with the password, for a process in the sandbox that reads the table and runs no
    task. It cannot reach the keyring."""
    source = sources.parse(path)
    password = password_of(source) if source.is_remote else ""
    return {PASSWORD: password} if password else {}
