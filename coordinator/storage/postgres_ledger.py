"""The ledger in PostgreSQL (extra `cluster`): a coordinator that is restarted elsewhere finds it.

An append is one statement, so one transaction: it locks the row of the fleet, checks that this
process still leads, and inserts. If the connection is lost in it, it is unknown whether it was
committed. So the next connection first takes the lease again with a higher epoch, after which the
lost statement cannot commit any more, and then looks at the last entry.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from coordinator.storage import postgres_session
from coordinator.storage.ledger import START, Entry, chain, checked, first_mismatch
from coordinator.storage.postgres_lease import VALID_S, Lease, LeaseKeeper, lost
from coordinator.storage.postgres_session import first_line, hang_up, shown
from protocols.errors import (
    CommonweightError,
    DiskFull,
    HomeError,
    LeadershipLost,
    LedgerUnreachable,
)
from protocols.local.failpoints import failpoint

if TYPE_CHECKING:
    from psycopg import Connection

log = logging.getLogger("commonweight.ledger")

_SELECT = "SELECT seq, at, subject, body, hash FROM commonweight_log"
_NEWEST = f"{_SELECT} ORDER BY seq DESC LIMIT 1"
_INSERT = """
WITH leader AS (SELECT 1 FROM commonweight_fleet WHERE epoch = %s AND moved_to = '' FOR UPDATE)
INSERT INTO commonweight_log (seq, at, subject, body, hash)
SELECT new.seq, %s::float8, %s, new.body, new.hash
FROM leader, unnest(%s::bigint[], %b::bytea[], %b::bytea[]) AS new (seq, body, hash)
"""
_COPY = "COPY commonweight_log (seq, at, subject, body, hash) FROM STDIN (FORMAT BINARY)"
#: Entries that this process has added last, which it does not read again.
_RECENT = 64


class _Group(NamedTuple):
    """What one `append` adds."""

    subject: str
    bodies: tuple[bytes, ...]
    entries: list[Entry]


class PostgresLedger:
    """A `Ledger` in PostgreSQL. Raises Unreachable, Refused, HomeError before it changes anything.

    `fleet`: the id of the fleet, which the database must have too. The writer verifies every entry
    and takes the lease: HomeLocked if another process keeps it. `patient`: wait for the lease.
    """

    is_remote = True

    def __init__(
        self, address: str, fleet: str, *, read_only: bool = False, patient: bool = False
    ) -> None:
        import psycopg

        self._address, self._read_only, self._patient = address, read_only, patient
        self._lock, self._lease, self._keeper = threading.Lock(), Lease(), None
        self._head: tuple[int, bytes] = (0, START)
        self._recent: tuple[Entry, ...] = ()
        #: The group whose commit was not acknowledged; by subject, those found committed since.
        self._doubtful: _Group | None = None
        self._unclaimed: dict[str, tuple[bytes, ...]] = {}
        self._db: Connection[Any] | None = postgres_session.connect(address)
        try:
            if read_only:
                postgres_session.check_readable(self._db, address, fleet)
                return
            postgres_session.prepare(self._db, address, fleet)
            self._verify_whole()
            before = self._last(self._db)
            self._lease.take(self._db, patient=patient)
            self._keeper = LeaseKeeper(address, self._lease, lambda: hang_up(self._db))
            self._head = self._last(self._db)
            if self._head != before:  # while it waited
                self._verify_whole()
        except psycopg.Error as err:
            self.close()
            raise postgres_session.error_of(err, address) from err
        except BaseException:
            self.close()
            raise

    def _verify_whole(self) -> None:
        changed = self.verify()
        if changed is not None:
            raise HomeError(
                f"the ledger {shown(self._address)} is damaged: entry {changed} does not match "
                "the one before",
                "nothing was changed; restore the database from a backup",
            )

    @property
    def term(self) -> int:
        """Higher than that of every process that has led before this one."""
        return self._lease.term

    # --- appending ---

    def append(self, subject: str, bodies: Sequence[bytes]) -> None:
        """Add entries in one transaction. Raises DiskFull, LedgerUnreachable, LeadershipLost."""
        with self._lock:
            for is_last in (False, True):
                self._connection()
                if (committed := self._unclaimed.pop(subject, None)) is not None:
                    if committed == tuple(bodies):
                        return
                    raise LeadershipLost(
                        "the database has added entries that were taken for lost",
                        "nothing was lost; a restart continues from the ledger",
                    )
                began = time.monotonic()
                try:
                    self._insert(subject, bodies)
                    return
                except LedgerUnreachable:
                    if is_last or time.monotonic() - began > VALID_S / 2:  # it hangs
                        raise

    def _insert(self, subject: str, bodies: Sequence[bytes]) -> None:
        import psycopg

        (seq, head), now, entries = self._head, time.time(), list[Entry]()
        for body in bodies:
            seq, head = seq + 1, chain(head, now, subject, body)
            entries.append(Entry(seq, now, subject, body, head))
        failpoint("ledger.inserted")
        columns = [[getattr(e, name) for e in entries] for name in ("seq", "body", "hash")]
        db = self._connection()
        try:
            with postgres_session.answered_within(db, VALID_S):
                added = db.execute(_INSERT, (self._lease.epoch, now, subject, *columns))
        except psycopg.errors.UniqueViolation as err:
            raise lost() from err
        except psycopg.Error as err:
            if isinstance(err, psycopg.errors.DiskFull):
                raise DiskFull(
                    f"the disk of the ledger {shown(self._address)} is full",
                    "free some space; the coordinator continues from the last entry",
                ) from err
            self._doubtful = _Group(subject, tuple(bodies), entries)
            raise self._disconnect(err) from err
        if added.rowcount != len(entries):
            self._lease.is_lost = True
            raise lost()
        self._remember(entries)
        self._head = (seq, head)

    def _remember(self, entries: list[Entry]) -> None:
        self._recent = (*self._recent, *entries)[-_RECENT:]

    def load(self, entries: Iterable[Entry]) -> int:
        """Fill an empty ledger with the entries of another one, all or none; how many there are.

        Raises HomeError if it is not empty or they do not match, LeadershipLost, psycopg.Error.
        """
        with self._lock, (db := self._connection()).transaction():
            row = db.execute("SELECT epoch FROM commonweight_fleet FOR UPDATE").fetchone()
            if row != (self._lease.epoch,):
                raise lost()
            if self._head[0]:
                raise HomeError(
                    f"the ledger {shown(self._address)} has {self._head[0]} entries already",
                    "name an empty schema: ?options=-csearch_path%3DNAME",
                )
            last = Entry(0, 0.0, "", b"", START)
            with db.cursor() as cursor, cursor.copy(_COPY) as copy:
                copy.set_types(["int8", "float8", "text", "bytea", "bytea"])
                for last in checked(entries):
                    copy.write_row(last)
            failpoint("ledger.copied")
        self._head = (last.seq, last.hash)
        return last.seq

    def mark_moved(self, to: str) -> None:
        """Refuse to be opened from now on, because the ledger was moved to `to`."""
        with self._lock:
            words = "UPDATE commonweight_fleet SET moved_to = %s WHERE epoch = %s"
            if self._connection().execute(words, (to, self._lease.epoch)).rowcount == 0:
                raise lost()

    # --- connections ---

    def _connection(self) -> Connection[Any]:
        """The connection; a new one after the old one was lost. Raises LedgerUnreachable."""
        import psycopg

        if self._lease.is_lost:
            raise lost()
        if self._db is not None:
            return self._db
        try:
            db = postgres_session.connect(self._address)
        except CommonweightError as err:
            raise self._disconnect(err.__cause__ or err) from err
        try:
            if not self._read_only:
                self._lease.retake(db)
                self._settle(db)
        except psycopg.Error as err:
            postgres_session.close(db)
            raise self._disconnect(err) from err
        except BaseException:
            postgres_session.close(db)
            raise
        log.info("the ledger %s answers again", shown(self._address))
        self._db = db
        return db

    def _settle(self, db: Connection[Any]) -> None:
        """Find out whether the doubtful group was committed. Raises LeadershipLost, HomeError."""
        found = self._last(db)
        doubtful, self._doubtful = self._doubtful, None
        if found == self._head:
            return
        if doubtful is None or found != (doubtful.entries[-1].seq, doubtful.entries[-1].hash):
            if found[0] < self._head[0]:
                raise HomeError(
                    f"the ledger {shown(self._address)} has lost entries: its last is {found[0]}, "
                    f"and {self._head[0]} were acknowledged",
                    "it was replaced by an older copy; continue with the server that has them",
                )
            self._lease.is_lost = True
            raise lost()
        self._head = found
        self._remember(doubtful.entries)
        self._unclaimed[doubtful.subject] = doubtful.bodies

    def _disconnect(self, err: BaseException) -> LedgerUnreachable:
        if self._db is not None:
            postgres_session.close(self._db)
            self._db = None
        text = f"the ledger {shown(self._address)} does not answer: {first_line(err)}"
        log.warning("%s", text)
        return LedgerUnreachable(text, _WAITS)

    # --- reading ---

    def _rows(self, query: str, given: Sequence[Any] = (), within_s: float = 1e6) -> list[Any]:
        """Raises LedgerUnreachable."""
        import psycopg

        with self._lock:
            for is_last in (False, True):
                try:
                    db = self._connection()
                    with postgres_session.answered_within(db, within_s):
                        return list(db.execute(query, given, binary=True).fetchall())
                except psycopg.OperationalError as err:
                    told = self._disconnect(err)
                    if is_last:
                        raise told from err
        raise AssertionError

    def _last(self, db: Connection[Any]) -> tuple[int, bytes]:
        row = db.execute(_NEWEST, binary=True).fetchone()
        return (row[0], row[4]) if row else (0, START)

    def entries(
        self, subject: str | None = None, *, before: int = 0, after: int = 0
    ) -> Iterator[Entry]:
        """All entries, oldest first, or those of one subject between two numbers (0: no limit)."""
        limits = (subject, after, before or 2**62) if subject else ()
        where = "WHERE subject = %s AND seq > %s AND seq < %s" if subject else ""
        return map(Entry._make, self._rows(f"{_SELECT} {where} ORDER BY seq", limits))

    def entries_after(self, seq: int, limit: int) -> list[Entry]:
        """At most `limit` entries with a higher number than `seq`, oldest first."""
        if not self._read_only:  # without the lock, which a lost connection holds for seconds
            (last, _), recent = self._head, self._recent
            if seq >= last or (recent and recent[0].seq <= seq + 1):
                return [entry for entry in recent if entry.seq > seq][:limit]
        if abs(seq) >= 2**62:
            return []
        query = f"{_SELECT} WHERE seq > %s ORDER BY seq LIMIT %s"
        return [Entry(*row) for row in self._rows(query, (seq, limit))]

    def entry(self, seq: int) -> Entry | None:
        """The entry of this number; None if there is none."""
        return next((found for found in self.entries_after(seq - 1, 1) if found.seq == seq), None)

    def subjects(self) -> list[str]:
        """All subjects, in order of their first entry."""
        query = "SELECT subject FROM commonweight_log GROUP BY subject ORDER BY min(seq)"
        return [subject for (subject,) in self._rows(query)]

    def newest(self) -> Entry | None:
        """The last entry; None if the ledger is empty."""
        rows = self._rows(_NEWEST)
        return Entry(*rows[0]) if rows else None

    def verify(self) -> int | None:
        """The number of the first entry whose hash does not match; None if all match."""
        import psycopg

        with self._lock:
            db = self._connection()
            try:
                # The log may be larger than memory. A cursor of the server needs a transaction.
                with db.transaction(), db.cursor("verify", binary=True) as cursor:
                    cursor.execute(f"{_SELECT} ORDER BY seq")
                    return first_mismatch(map(Entry._make, cursor))
            except psycopg.OperationalError as err:
                raise self._disconnect(err) from err

    def check_answers(self) -> None:
        """Raises LedgerUnreachable, LeadershipLost."""
        self._rows("SELECT 1", within_s=VALID_S / 2)

    def check_leads(self) -> None:
        """Raises LeadershipLost if another process has taken over, or may have (`patient`)."""
        if self._lease.is_lost:
            raise lost()
        if self._patient and self._lease.is_expired:
            raise LeadershipLost(
                f"the lease on the ledger was not renewed for {VALID_S:g} s, so another "
                "coordinator may lead",
                "nothing was lost; look whether the database answers this machine",
            )

    def close(self) -> None:
        """Close it, and let another process lead."""
        import psycopg

        if self._keeper is not None:
            self._keeper.stop()
        with self._lock:
            if self._db is not None:
                with contextlib.suppress(psycopg.Error):  # then the lease expires
                    if not self._lease.is_expired:
                        self._lease.release(self._db)
                postgres_session.close(self._db)
                self._db = None


_WAITS = "the coordinator waits for it; start the database, or repair the network"
