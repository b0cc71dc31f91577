"""The lease on a ledger in PostgreSQL: one coordinator leads, until its lease expires.

The row of `commonweight_fleet` names the holder, an epoch and when the lease expires, by the clock
of the database. A thread renews it every 2 s for 6 s. Each lease that is taken, also again by the
same holder after a lost connection, has a higher epoch. `append` writes only if the row still has
the epoch of the writer, so that a former leader writes nothing.

The epoch is at least the time (Unix s) when the lease was taken. So it grows too when the ledger
moves to another schema, or its database is restored from a backup.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.storage import postgres_session
from protocols.errors import CommonweightError, HomeLocked, LeadershipLost

if TYPE_CHECKING:
    from psycopg import Connection

log = logging.getLogger("commonweight.ledger")

RENEW_S = 2.0
VALID_S = 6.0
_POLL_S = 0.5
_UNTIL = f"clock_timestamp() + interval '{VALID_S} s'"
_TAKE = (
    "UPDATE commonweight_fleet SET holder = %s, "
    "epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint), "
    f"expires = {_UNTIL} WHERE expires <= clock_timestamp() AND moved_to = '' RETURNING epoch"
)
_RETAKE = (
    f"UPDATE commonweight_fleet SET epoch = epoch + 1, expires = {_UNTIL} "
    "WHERE holder = %s AND moved_to = '' RETURNING epoch"
)
_RENEW = f"UPDATE commonweight_fleet SET expires = {_UNTIL} WHERE holder = %s RETURNING epoch"
_RELEASE = "UPDATE commonweight_fleet SET expires = clock_timestamp() WHERE holder = %s"


class Lease:
    """A lease of this process. `is_lost`: another one leads, for good.

    `term`: the epoch with which this process began to lead. `epoch` is higher after a lost
    connection.
    """

    def __init__(self) -> None:
        # Unique, so no other process renews it or takes it again.
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.term = self.epoch = 0
        self.is_lost = False
        self._renewed_at = -math.inf

    @property
    def is_expired(self) -> bool:
        """True if another process may have taken it.

        It expires here before it does in the database. A machine that sleeps does not notice.
        """
        return time.monotonic() - self._renewed_at > VALID_S

    def take(self, db: Connection[Any], *, patient: bool = False) -> None:
        """Take the lease once it is free. Raises HomeLocked if another process keeps renewing it.

        `patient`: wait as long as it takes. Raises psycopg.Error.
        """
        give_up_at, told = time.monotonic() + VALID_S + RENEW_S, False
        while not (row := self._changed(db, _TAKE)):
            holder = (db.execute("SELECT holder FROM commonweight_fleet").fetchone() or ("?",))[0]
            if not told:
                told = True
                log.info("the ledger is led by %s: waiting for the end of its lease", holder)
            if time.monotonic() > give_up_at and not patient:
                raise HomeLocked(
                    f"another program writes to this ledger: {holder}",
                    "stop it first; two coordinators cannot write to one ledger",
                )
            time.sleep(_POLL_S)
        self.term = self.epoch = row[0]

    def retake(self, db: Connection[Any]) -> None:
        """Take the lease again after a lost connection, so that what the old one still executes
        comes too late. Raises LeadershipLost, psycopg.Error."""
        row = self._changed(db, _RETAKE)
        if row is None:
            self.is_lost = True
            raise lost()
        self.epoch = row[0]

    def renew(self, db: Connection[Any]) -> None:
        """Raises LeadershipLost, psycopg.Error."""
        if self._changed(db, _RENEW) is None:
            self.is_lost = True
            raise lost()

    def release(self, db: Connection[Any]) -> None:
        """Let another process lead at once. Raises psycopg.Error."""
        with postgres_session.answered_within(db, VALID_S):
            db.execute(_RELEASE, (self.holder,))

    def _changed(self, db: Connection[Any], statement: str) -> tuple[int] | None:
        """The row after a statement that prolongs the lease; None if it changed nothing."""
        began = time.monotonic()  # not later than the database prolongs it
        with postgres_session.answered_within(db, VALID_S - RENEW_S):
            row: tuple[int] | None = db.execute(statement, (self.holder,)).fetchone()
        if row is not None:
            self._renewed_at = began
        return row


def lost() -> LeadershipLost:
    return LeadershipLost(
        "another coordinator has taken over the ledger",
        "nothing was lost; a restart of this one continues from the ledger",
    )


class LeaseKeeper:
    """A thread with a connection of its own that renews a lease.

    `on_expired` is called while it cannot, once the lease has expired: other statements hang too.
    """

    def __init__(self, address: str, lease: Lease, on_expired: Callable[[], None]) -> None:
        self._address, self._lease, self._on_expired = address, lease, on_expired
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import psycopg

        db: Connection[Any] | None = None
        while not self._stopping.wait(RENEW_S):
            try:
                db = db or postgres_session.connect(self._address)
                self._lease.renew(db)
            except LeadershipLost as err:
                log.error("%s", err)
                break
            except (psycopg.Error, CommonweightError) as err:
                if db is not None:  # once; `append` says it, too
                    log.warning("the lease cannot be renewed: %s", postgres_session.first_line(err))
                    postgres_session.close(db)
                db = None
                if self._lease.is_expired:
                    self._on_expired()
        if db is not None:
            postgres_session.close(db)

    def stop(self) -> None:
        """End the thread. It does not wait for a connection that hangs."""
        self._stopping.set()
        with contextlib.suppress(RuntimeError):  # called by the thread itself
            self._thread.join(timeout=RENEW_S)
