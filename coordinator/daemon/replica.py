"""A replica: waits until no other coordinator of the fleet leads, then leads, again and again.

While it waits it does not listen where the leader does, so that a proxy in front finds the leader.
It may send versions at another address (`follower`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.daemon.follower import Follower, check_settings
from coordinator.storage import ledger_place, settings
from coordinator.storage.ledger import Ledger
from coordinator.storage.settings import UP_FILE, Settings
from protocols.errors import LeadershipLost, Unreachable, UsageError

log = logging.getLogger("commonweight.hub")

_RETRY_S = 1.0
#: Of the thread that has sent versions.
_END_WITHIN_S = 10.0


def lead_in_turn(home: Path, chosen: Settings, lead: Callable[[Ledger], None]) -> None:
    """Call `lead` with the ledger whenever this process leads, until it returns.

    `lead` closes the ledger. Raises UsageError if the ledger is a file, and what `lead` raises.
    """
    if not ledger_place.address_of(home):
        raise UsageError(
            "a replica needs a ledger that others can reach, and this one is a file",
            "move it to PostgreSQL first: commonweight admin ledger move --to ADDRESS",
        )
    check_settings(chosen)
    (home / UP_FILE).unlink(missing_ok=True)  # of a process that was killed
    sender: Follower | None = None
    while True:
        if sender is not None:
            sender.join(_END_WITHIN_S)
        if chosen.download_port:
            sender = Follower(home, settings.open_keys(home), chosen)
            sender.start()
        ledger = _wait_for_lead(home)
        if sender is not None:
            sender.end()
        log.info("this coordinator leads")
        try:
            return lead(ledger)
        except LeadershipLost as err:
            log.error("%s: waiting to lead again", err.message)


def _wait_for_lead(home: Path) -> Ledger:
    """The ledger, once this process leads. Raises HomeError, Refused, UsageError."""
    unreachable = False
    while True:
        try:
            return ledger_place.open_ledger(home, patient=True)
        except Unreachable as err:
            if not unreachable:
                log.warning("%s: waiting for it", err)
            unreachable = True
            time.sleep(_RETRY_S)
