"""What this machine refused by its owner's rules: entries of the ledger, in a file of their own.

A coordinator can ask without limit. In this file, its requests cannot push out entries of answers
that left.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from pathlib import Path

from agent.home import audit_log
from agent.home.audit_log import AuditEntry
from protocols.messages.envelope import strip_controls

log = logging.getLogger("commonweight.agent")

FILE = "refused.jsonl"
MAX_BYTES = 1 << 20
_MAX_REMEMBERED = 256


class RefusalLog:
    """Writes each refusal once."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE
        self._written: OrderedDict[tuple[str, str], None] = OrderedDict()

    def note(self, run: str, task: str, text: str) -> bool:
        """Write a refusal. False if this run was refused for the same reason lately."""
        run, text = strip_controls(run)[:64], strip_controls(text)
        if (run, text) in self._written:
            self._written.move_to_end((run, text))
            return False
        self._written[run, text] = None
        if len(self._written) > _MAX_REMEMBERED:
            self._written.popitem(last=False)
        entry = AuditEntry(at=time.time(), run=run, task=task, round=0, what="refused", told=text)
        try:
            audit_log.append_entry(self._path, entry, MAX_BYTES)
        except OSError as err:  # a refusal contains nothing of the owner's data
            log.warning("cannot write the refusal to %s: %s", FILE, err.strerror)
        return True


def read(home: Path) -> list[AuditEntry]:
    """All refusals, oldest first. Incomplete lines are skipped."""
    return audit_log.read_entries(home / FILE)
