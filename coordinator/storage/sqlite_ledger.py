"""The ledger as a SQLite file in the home: the default."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from coordinator.storage.ledger import FORMAT, START, Entry, chain, checked, first_mismatch
from protocols.errors import DiskFull, HomeError, HomeTooNew
from protocols.local.failpoints import failpoint

_SELECT = "SELECT seq, at, subject, body, hash FROM log"


class SqliteLedger:
    """A `Ledger` in a file. Raises HomeError when the file cannot be used.

    The writer verifies every entry before it changes anything. `read_only`: for readers beside the
    one writer. Not `synced` (simulations): a power cut may take the newest entries.
    """

    is_remote, term = False, 0

    def __init__(self, path: Path, *, read_only: bool = False, synced: bool = True) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            if not read_only and path.exists() and path.stat().st_size:
                _verify_file(path)
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                check_same_thread=False,
                isolation_level=None,
            )
            if not read_only:
                path.chmod(0o600)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            self._check_format()
            if not read_only:
                self._prepare()
            row = self._db.execute("SELECT hash FROM log ORDER BY seq DESC LIMIT 1").fetchone()
        except (sqlite3.DatabaseError, OSError) as err:
            raise HomeError(
                f"the ledger {path} cannot be used: {err}",
                "nothing was changed; restore the ledger from a backup, or check the disk",
            ) from err
        self._head: bytes = row[0] if row else START

    def _check_format(self) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > FORMAT:
            raise HomeTooNew(
                f"the ledger has format {found}; this version writes {FORMAT}",
                "update commonweight on this machine",
            )

    def _prepare(self) -> None:
        self._db.executescript(
            f"""
            CREATE TABLE IF NOT EXISTS log (
                seq INTEGER PRIMARY KEY, at REAL NOT NULL, subject TEXT NOT NULL,
                body BLOB NOT NULL, hash BLOB NOT NULL);
            CREATE INDEX IF NOT EXISTS log_subject ON log (subject, seq);
            PRAGMA user_version = {FORMAT};
            """
        )

    def append(self, subject: str, bodies: Sequence[bytes]) -> None:
        """Add entries in one transaction. Raises DiskFull, HomeError (file gone)."""
        with self._lock:
            head, now = self._head, time.time()
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for body in bodies:
                    head = chain(head, now, subject, body)
                    self._db.execute(
                        "INSERT INTO log (at, subject, body, hash) VALUES (?, ?, ?, ?)",
                        (now, subject, body, head),
                    )
                failpoint("ledger.inserted")
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError as err:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if getattr(err, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                    raise DiskFull(
                        f"the disk of the ledger {self._path} is full",
                        "free some space; the coordinator continues from the last entry",
                    ) from err
                raise HomeError(
                    f"the ledger {self._path} cannot be written: {err}",
                    "free some space on the disk; the coordinator continues from the last entry",
                ) from err
            self._head = head

    def load(self, entries: Iterable[Entry]) -> int:
        """Fill an empty ledger with the entries of another one, all or none; how many there are.

        Raises HomeError if it is not empty or they do not match.
        """
        last = Entry(0, 0.0, "", b"", START)
        with self._lock:
            if self._head != START:
                raise HomeError(f"the ledger {self._path} has entries already", "move it away")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for last in checked(entries):
                    self._db.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", last)
                failpoint("ledger.copied")
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._head = last.hash
        return last.seq

    def check_answers(self) -> None:
        """Do nothing: a file answers."""

    def check_leads(self) -> None:
        """There is no other writer: the home is locked."""

    def entries(
        self, subject: str | None = None, *, before: int = 0, after: int = 0
    ) -> Iterator[Entry]:
        """All entries, oldest first, or those of one subject between two numbers (0: no limit)."""
        limits = (subject, after, before or 2**62) if subject else ()
        where = "WHERE subject = ? AND seq > ? AND seq < ?" if subject else ""
        with self._lock:
            rows = self._db.execute(f"{_SELECT} {where} ORDER BY seq", limits).fetchall()
        return (Entry(*row) for row in rows)

    def entries_after(self, seq: int, limit: int) -> list[Entry]:
        """At most `limit` entries with a higher number than `seq`, oldest first."""
        with self._lock:
            rows = self._db.execute(f"{_SELECT} WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
            return [Entry(*row) for row in rows]

    def entry(self, seq: int) -> Entry | None:
        """The entry of this number; None if there is none."""
        with self._lock:
            row = self._db.execute(f"{_SELECT} WHERE seq = ?", (seq,)).fetchone()
        return Entry(*row) if row else None

    def subjects(self) -> list[str]:
        """All subjects, in order of their first entry."""
        with self._lock:
            rows = self._db.execute("SELECT subject FROM log GROUP BY subject ORDER BY MIN(seq)")
            return [subject for (subject,) in rows]

    def newest(self) -> Entry | None:
        """The last entry; None if the ledger is empty."""
        with self._lock:
            row = self._db.execute(f"{_SELECT} ORDER BY seq DESC LIMIT 1").fetchone()
        return Entry(*row) if row else None

    def verify(self) -> int | None:
        """The number of the first entry whose hash does not match; None if all match."""
        with self._lock:  # one by one: the log may be larger than memory
            return first_mismatch(map(Entry._make, self._db.execute(f"{_SELECT} ORDER BY seq")))

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _verify_file(path: Path) -> None:
    """Raise HomeError, or SQLite's error, unless every entry's hash matches."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        begun = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone()
    if not begun:  # the first start was interrupted
        return
    with contextlib.closing(SqliteLedger(path, read_only=True)) as ledger:
        changed = ledger.verify()
    if changed is not None:
        raise HomeError(
            f"the ledger {path} is damaged: entry {changed} does not match the one before",
            "nothing was changed; restore the ledger from a backup, or check the disk",
        )
