"""What happened to offered tasks: entries of the ledger, in two files of their own.

A coordinator can offer without limit. In a file of their own, offers cannot push out entries of
answers that left, refusals, or the owner's decisions about offers.
"""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path

from agent.home import audit_log
from agent.home.audit_log import AuditEntry, OfferKind

FILE, DECIDED_FILE = "offered.jsonl", "decided.jsonl"
#: Of each file.
MAX_BYTES = 1 << 20
_BY_OPERATOR: frozenset[OfferKind] = frozenset(("task offered", "task withdrawn"))


def write(home: Path, what: OfferKind, task: str, digest: str, told: str = "") -> None:
    """Write an entry, and fsync. Raises OSError."""
    entry = AuditEntry(
        at=time.time(), run="", task=task, round=0, what=what, digest=digest, told=told
    )
    file = FILE if what in _BY_OPERATOR else DECIDED_FILE
    audit_log.append_entry(home / file, entry, MAX_BYTES)


def read(home: Path) -> list[AuditEntry]:
    """All entries, oldest first."""
    found = (audit_log.read_entries(home / file) for file in (FILE, DECIDED_FILE))
    return sorted(chain.from_iterable(found), key=lambda entry: entry.at)
