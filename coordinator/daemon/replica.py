"""A replica: waits until no other coordinator of the fleet leads, then leads, again and again.

While it waits it serves nothing and does not listen, so that a proxy in front finds the leader.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.storage import ledger_place
from coordinator.storage.ledger import Ledger
from coordinator.storage.settings import UP_FILE
from protocols.errors import LeadershipLost, Unreachable, UsageError

log = logging.getLogger("commonweight.hub")

_RETRY_S = 1.0


def lead_in_turn(home: Path, lead: Callable[[Ledger], None]) -> None:
    """Call `lead` with the ledger whenever this process leads, until it returns.

    `lead` closes the ledger. Raises UsageError if the ledger is a file, and what `lead` raises.
    """
    if not ledger_place.address_of(home):
        raise UsageError(
            "a replica needs a ledger that others can reach, and this one is a file",
            "move it to PostgreSQL first: commonweight admin ledger move --to ADDRESS",
        )
    (home / UP_FILE).unlink(missing_ok=True)  # of a process that was killed
    unreachable = False
    while True:
        try:
            ledger = ledger_place.open_ledger(home, patient=True)
        except Unreachable as err:
            if not unreachable:
                log.warning("%s: waiting for it", err)
            unreachable = True
            time.sleep(_RETRY_S)
            continue
        unreachable = False
        log.info("this coordinator leads")
        try:
            return lead(ledger)
        except LeadershipLost as err:
            log.error("%s: waiting to lead again", err.message)
