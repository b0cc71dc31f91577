"""What happened to offered tasks: entries of the ledger, in a file of their own.

A coordinator can offer as often as it likes. In this file its offers push out no entry of an answer
that has left, and no refusal.
"""

from __future__ import annotations

import time
from pathlib import Path

from agent.home import audit_log
from agent.home.audit_log import AuditEntry, OfferKind

FILE = "offered.jsonl"
MAX_BYTES = 1 << 20


def write(home: Path, what: OfferKind, task: str, digest: str, told: str = "") -> None:
    """Write an entry, and fsync. Raises OSError."""
    entry = AuditEntry(
        at=time.time(), run="", task=task, round=0, what=what, digest=digest, told=told
    )
    audit_log.append_entry(home / FILE, entry, MAX_BYTES)


def read(home: Path) -> list[AuditEntry]:
    """All entries, oldest first."""
    return audit_log.read_entries(home / FILE)
