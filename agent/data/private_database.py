"""Opens a SQLite file of the owner: mode 0600, each commit on disk, shared by two processes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protocols.errors import DiskFull, HomeError

#: The agent and its trainer write for milliseconds; a longer wait is an error.
_WAIT_S = 60.0


def open_database(path: Path, schema: str, wait_s: float = _WAIT_S) -> sqlite3.Connection:
    """The database with these tables; others may hold its lock for `wait_s`.

    Raises OSError, HomeError.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():  # else the file would look changed
        path.touch(mode=0o600)
    db = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(schema)
    except sqlite3.DatabaseError as err:  # an answer without a memory could reveal a row
        db.close()
        raise HomeError(
            f"the memory of what was told cannot be read: {err}",
            f"restore {path} from a backup; without one, move it away, and what was told before is "
            "no longer compared",
        ) from err
    return db


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """One transaction; other processes wait to write, and an error rolls it back.

    Raises DiskFull, and HomeError if the file cannot be written.
    """
    try:
        with mapped_errors():
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("COMMIT")
    finally:
        if db.in_transaction:  # SQLite itself ends it for some errors
            with suppress(sqlite3.DatabaseError):
                db.execute("ROLLBACK")


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Raises DiskFull and HomeError for errors of SQLite."""
    try:
        yield
    except sqlite3.DatabaseError as err:
        hint = "nothing leaves until it can be; see commonweight-agent doctor"
        raise database_error("the memory of what was told", err, hint) from err


def database_error(name: object, err: Exception, hint: str) -> DiskFull | HomeError:
    """The error for one of SQLite in the database `name`; the hint is for all but a full disk."""
    if getattr(err, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return DiskFull("the disk is full", "free some space; the agent then continues")
    return HomeError(f"{name} cannot be used: {err}", hint)
