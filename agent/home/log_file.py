"""The SQLite file of this agent's part of the log of versions: tables, transactions, small values.

Only the agent writes, so what each work needs is in memory too, which halves the statements of a
work. After an error of the file, the memory is read again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agent.data.private_database import database_error
from protocols.errors import DiskFull, HomeError
from protocols.messages.version_log import LogEntry, LogHead

FILE = "log.db"
#: Another program waits this long: pages of the log may be fetched within a transaction.
_WAIT_S = 60.0


class Known(NamedTuple):
    """An accepted head of the log, and its signed bytes."""

    size: int
    hash: bytes
    head: bytes


class Appended(NamedTuple):
    """The end of the log: its size and hash, and the last entry of a run, with the log's size then.
    No other entry of that run comes after it."""

    size: int
    hash: bytes
    of_run: tuple[int, LogEntry] | None


@dataclass
class _Cache:
    """What is in memory too; None if it is not read yet. `newest` has one item, the last head."""

    meta: dict[str, bytes] | None = None
    newest: tuple[Known | None] | None = None
    appended: Appended | None = None
    #: When the last head for the audit was signed (Unix s).
    audited_at: float | None = None
    last_epoch: int | None = None
    #: The last head that `note_epoch` has written.
    noted: LogHead | None = None


class LogFile:
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

    # --- statements ---

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
                self._execute("COMMIT")
            else:  # it was dropped, as the disk is full
                self._cache = _Cache()

    def _write(self, statement: str, *rows: tuple[object, ...]) -> None:
        try:
            if len(rows) > 1:
                self._db.executemany(statement, rows)
            else:
                self._db.execute(statement, *rows)
        except sqlite3.DatabaseError as err:
            raise self._failed(err) from err

    def _failed(self, err: sqlite3.DatabaseError) -> DiskFull | HomeError:
        """The error as ours. Clears the memory, which the file may not have reached, and drops what
        the transaction has written: a part of it may be missing."""
        self._cache = _Cache()
        if self._db.in_transaction:
            with suppress(sqlite3.DatabaseError):
                self._db.execute("ROLLBACK")
        return _error(self._path, err)


def _error(path: Path, err: sqlite3.DatabaseError) -> DiskFull | HomeError:
    hint = "move it away: the agent then reads the coordinator's log from the start"
    return database_error(path, err, hint)
