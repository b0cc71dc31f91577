"""This agent's part of the coordinator's log of versions, in one SQLite file of its home.

It holds the last entries with their hashes, the heads that were signed over them, and what other
peers have seen. Used by several threads; the caller holds a lock. Only the agent writes, so what
each work needs is in memory too, which halves the statements of a work.
"""

from __future__ import annotations

import math
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agent.data.private_database import database_error
from protocols.errors import DiskFull, HomeError
from protocols.messages.version_log import LogEntry, LogHead

FILE = "log.db"
#: Entries and heads that are kept. Heads for the audit are kept once an hour.
MAX_ENTRIES, MAX_AUDIT_HEADS = 4096, 10_000
_PRUNE_EVERY, _AUDIT_EVERY_S = 64, 3600.0
#: Another program waits this long: pages of the log may be fetched within a transaction.
_WAIT_S = 60.0


class Known(NamedTuple):
    """An accepted head of the log, and its signed bytes."""

    size: int
    hash: bytes
    head: bytes


class Confirmed(NamedTuple):
    """The newest head of a peer, of this epoch, that agrees with what this agent has seen."""

    peer: str
    size: int
    at: float


@dataclass
class _Cache:
    """What is in memory too; None if it is not read yet. `newest` has one item, the last head."""

    meta: dict[str, bytes] | None = None
    newest: tuple[Known | None] | None = None
    #: When the last head for the audit was signed (Unix s).
    audited_at: float | None = None
    last_epoch: int | None = None
    #: The last head that `note_epoch` has written.
    noted: LogHead | None = None


class LogStore:
    """The file of one fleet. Raises HomeError if it cannot be used, DiskFull."""

    def __init__(self, home: Path, fleet: str) -> None:
        self._path = home / FILE
        self._cache = _Cache()
        try:
            self._db = sqlite3.connect(
                self._path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
            self._path.chmod(0o600)
            self._db.executescript(
                """
                PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
                CREATE TABLE IF NOT EXISTS entries (
                    size INTEGER PRIMARY KEY, entry BLOB, hash BLOB NOT NULL, got REAL NOT NULL,
                    kind TEXT, run TEXT, number INTEGER, digest TEXT);
                CREATE INDEX IF NOT EXISTS entries_run ON entries (run, number);
                CREATE TABLE IF NOT EXISTS heads (
                    ledger INTEGER PRIMARY KEY, size INTEGER NOT NULL, head BLOB NOT NULL);
                CREATE INDEX IF NOT EXISTS heads_size ON heads (size);
                CREATE TABLE IF NOT EXISTS audit (at REAL PRIMARY KEY, head BLOB NOT NULL);
                CREATE TABLE IF NOT EXISTS confirmed (
                    peer TEXT PRIMARY KEY, size INTEGER NOT NULL, at REAL NOT NULL);
                CREATE TABLE IF NOT EXISTS epochs (
                    epoch INTEGER PRIMARY KEY, at REAL NOT NULL, head BLOB NOT NULL);
                CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
                """
            )
            if self.meta("fleet") != fleet.encode():
                self.forget()
                self.set_meta("fleet", fleet.encode())
        except sqlite3.DatabaseError as err:
            raise _error(self._path, err) from err

    def close(self) -> None:
        self._db.close()

    # --- small values ---

    def meta(self, name: str) -> bytes:
        """A value, or empty."""
        if self._cache.meta is None:
            rows = self._execute("SELECT name, value FROM meta")
            self._cache.meta = {str(key): bytes(found) for key, found in rows}
        return self._cache.meta.get(name, b"")

    def set_meta(self, name: str, value: bytes) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
        self._cache.meta = None

    def number(self, name: str) -> float:
        return float(self.meta(name) or 0)

    def forget(self) -> None:
        """Forget all but the heads of the audit. The log then starts again."""
        for table in ("entries", "heads", "confirmed", "epochs", "meta"):
            self._write(f"DELETE FROM {table}")
        self._cache = _Cache()

    # --- the log ---

    def newest(self) -> Known | None:
        """The last accepted head."""
        if self._cache.newest is None:
            self._cache.newest = (self.head_until(sys.maxsize),)
        return self._cache.newest[0]

    def first_size(self) -> int:
        """How many entries precede the first that is known here."""
        row = self._execute("SELECT MIN(size) FROM entries").fetchone()
        return int(row[0] or 0)

    def head_until(self, size: int) -> Known | None:
        """The last accepted head with at most `size` entries."""
        # CROSS JOIN keeps SQLite from the other order, which reads and sorts all heads.
        row = self._execute(
            "SELECT e.size, e.hash, h.head FROM heads h CROSS JOIN entries e ON e.size = h.size "
            "WHERE h.size <= ? ORDER BY h.size DESC, h.ledger DESC LIMIT 1",
            (size,),
        ).fetchone()
        return Known(*row) if row else None

    def head_of_ledger(self, ledger: int) -> bytes:
        """The accepted head over this many entries of the ledger, or empty."""
        row = self._execute("SELECT head FROM heads WHERE ledger = ?", (ledger,)).fetchone()
        return bytes(row[0]) if row else b""

    def hash_at(self, size: int) -> bytes | None:
        """The hash of the log's first `size` entries; None if it is not known here."""
        row = self._execute("SELECT hash FROM entries WHERE size = ?", (size,)).fetchone()
        return bytes(row[0]) if row else None

    def entries(self, after: int, until: int) -> list[bytes]:
        """The entries `after` + 1 to `until`, as they are encoded."""
        rows = self._execute(
            "SELECT entry FROM entries WHERE size > ? AND size <= ? ORDER BY size", (after, until)
        )
        return [bytes(entry) for (entry,) in rows]

    def last_versions(self, runs: set[str]) -> dict[str, tuple[int, str]]:
        """By run: number and digest of its last version; -1 if it has none. Unknown runs are left
        out."""
        found = {}
        for run in runs:
            row = self._execute(
                "SELECT kind, number, digest FROM entries WHERE run = ? ORDER BY size DESC LIMIT 1",
                (run,),
            ).fetchone()
            if row:
                found[run] = (-1, "") if row[0] == "run" else (int(row[1]), str(row[2]))
        return found

    def last_entry_of(self, run: str, number: int) -> int:
        """The place of the entry of this run that version `number` repeats; 0 if unknown."""
        row = self._execute(
            "SELECT MAX(size) FROM entries WHERE run = ? AND (number >= ? OR kind = 'run')",
            (run, number),
        ).fetchone()
        return int(row[0] or 0)

    def has_version(self, run: str, number: int, digest: str, until: int) -> bool:
        """Whether the first `until` entries have this version, and none takes it back."""
        row = self._execute(
            "SELECT size, digest FROM entries WHERE run = ? AND number = ? AND size <= ? "
            "AND kind IN ('version', 'back') ORDER BY size DESC LIMIT 1",
            (run, number, until),
        ).fetchone()
        if not row or row[1] != digest:
            return False
        taken_back = self._execute(
            "SELECT 1 FROM entries WHERE run = ? AND kind = 'back' AND number < ? AND size > ? "
            "AND size <= ?",
            (run, number, row[0], until),
        ).fetchone()
        return taken_back is None

    def start(self, size: int, hash_: bytes) -> None:
        """Begin with a log of `size` entries that are not known here."""
        self._write(
            "INSERT OR REPLACE INTO entries (size, hash, got) VALUES (?, ?, ?)",
            (size, hash_, time.time()),
        )
        self._cache.newest = None

    def append(
        self, start: int, entries: Sequence[tuple[bytes, LogEntry]], hashes: Sequence[bytes]
    ) -> None:
        """Add the entries that follow the first `start`, with the hash after each."""
        now = time.time()
        rows = [
            (size, data, hash_, now, entry.kind, entry.run, entry.number, entry.digest)
            for size, ((data, entry), hash_) in enumerate(
                zip(entries, hashes, strict=True), start + 1
            )
        ]
        if not rows:
            return
        self._write("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *rows)
        self._cache.newest = None
        end = start + len(rows)
        if end // _PRUNE_EVERY != start // _PRUNE_EVERY:
            self._write("DELETE FROM entries WHERE size <= ?", (end - MAX_ENTRIES,))
            self._write("DELETE FROM heads WHERE size <= ?", (end - MAX_ENTRIES,))

    def add_head(self, head: LogHead, signed: bytes) -> None:
        """Remember an accepted head. One of each size is enough, beside the newest."""
        self._write("DELETE FROM heads WHERE size = ?", (head.size,))
        self._write(
            "INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (head.ledger, head.size, signed)
        )
        self._cache.newest = None
        if self._cache.audited_at is None:
            (last,) = self._execute("SELECT MAX(at) FROM audit").fetchone()
            self._cache.audited_at = -math.inf if last is None else float(last)
        if head.at > self._cache.audited_at + _AUDIT_EVERY_S:
            self._write("INSERT OR REPLACE INTO audit VALUES (?, ?)", (head.at, signed))
            self._cache.audited_at = head.at
            self._write(
                "DELETE FROM audit WHERE at <= (SELECT at FROM audit ORDER BY at DESC "
                "LIMIT 1 OFFSET ?)",
                (MAX_AUDIT_HEADS,),
            )

    def audit_heads(self) -> list[bytes]:
        """Signed heads that this agent has seen, one an hour and the newest, oldest first."""
        rows = [bytes(head) for (head,) in self._execute("SELECT head FROM audit ORDER BY at")]
        newest = self.newest()
        return [*rows, newest.head] if newest and newest.head not in rows else rows

    def cut(self, size: int) -> list[LogEntry]:
        """Forget all after the first `size` entries; return these entries."""
        rows = self._execute(
            "SELECT kind, got, run, number, digest FROM entries WHERE size > ? ORDER BY size",
            (size,),
        ).fetchall()
        self._write("DELETE FROM entries WHERE size > ?", (size,))
        self._write("DELETE FROM heads WHERE size > ?", (size,))
        self._write("DELETE FROM confirmed")
        self._cache.newest = None
        return [LogEntry(*row) for row in rows if row[0]]

    # --- epochs ---

    def note_epoch(self, head: LogHead, signed: bytes) -> None:
        """Remember the earliest head of its epoch, shown to this agent or to another peer."""
        noted = self._cache.noted
        if noted and noted.epoch == head.epoch and noted.at <= head.at:
            return
        self._write(
            "INSERT INTO epochs VALUES (?, ?, ?) ON CONFLICT (epoch) DO UPDATE SET "
            "at = excluded.at, head = excluded.head WHERE excluded.at < at",
            (head.epoch, head.at, signed),
        )
        self._cache.noted, self._cache.last_epoch = head, None

    def newer_epoch(self, epoch: int, before: float) -> bytes:
        """A head of a newer epoch that was signed `before` a time (Unix s), or empty."""
        if self._cache.last_epoch is None:
            (last,) = self._execute("SELECT MAX(epoch) FROM epochs").fetchone()
            self._cache.last_epoch = -1 if last is None else int(last)
        if epoch >= self._cache.last_epoch:
            return b""
        row = self._execute(
            "SELECT head FROM epochs WHERE epoch > ? AND at < ? ORDER BY at LIMIT 1",
            (epoch, before),
        ).fetchone()
        return bytes(row[0]) if row else b""

    # --- other peers ---

    def confirm(self, peer: str, size: int, at: float) -> None:
        """A peer's head of `size` entries, signed by it `at` a time, agrees with ours."""
        self._write(
            "INSERT INTO confirmed VALUES (?, ?, ?) ON CONFLICT (peer) DO UPDATE SET "
            "size = excluded.size, at = excluded.at WHERE excluded.size >= size",
            (peer, size, at),
        )

    def confirmed(self) -> list[Confirmed]:
        return [Confirmed(*row) for row in self._execute("SELECT * FROM confirmed")]

    def size_before(self, at: float) -> int:
        """How many entries were known `at` a time (Unix s)."""
        row = self._execute("SELECT MAX(size) FROM entries WHERE got <= ?", (at,)).fetchone()
        return int(row[0] or 0)

    # --- the file ---

    def _execute(self, statement: str, arguments: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, arguments)
        except sqlite3.DatabaseError as err:
            raise self._failed(err) from err

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes within reach the file at once; those before a conflict too."""
        self._execute("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:
                self._commit()
            else:  # SQLite has ended it, as the disk is full
                self._cache = _Cache()

    def _commit(self) -> None:
        try:
            self._execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _write(self, statement: str, *rows: tuple[object, ...]) -> None:
        try:
            if len(rows) > 1:
                self._db.executemany(statement, rows)
            else:
                self._db.execute(statement, *rows)
        except sqlite3.DatabaseError as err:
            raise self._failed(err) from err

    def _failed(self, err: sqlite3.DatabaseError) -> DiskFull | HomeError:
        """The error as ours. Clears the memory, which the file may not have reached."""
        self._cache = _Cache()
        return _error(self._path, err)


def _error(path: Path, err: sqlite3.DatabaseError) -> DiskFull | HomeError:
    hint = "move it away: the agent then reads the coordinator's log from the start"
    return database_error(path, err, hint)
