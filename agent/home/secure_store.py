"""The turns of secure sums that this agent takes part in: one SQLite file in its home, mode 0600.

A turn is recorded step by step, and each step is on disk before its answer leaves. What was
recorded is never changed: another value for a step is refused here too, beside the checks of
`protocols.privacy.secagg.peer`. Secrets of a turn are overwritten with its last answer, or else
once a newer turn of its run begins. The record of the turn stays, so its keys are never made again.

A copy of the home, or a snapshot of the machine, that is put back undoes this: the agent then
answers again as it did before. See docs/security.md.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import RLock
from typing import NamedTuple

import msgspec

from agent.data.private_database import database_error
from protocols.errors import DiskFull, HomeError, SecureRefused
from protocols.local.failpoints import failpoint
from protocols.privacy.secagg.turn import Turn

FILE = "secure.db"
#: The folder in the home with the turns of secure questions, which are asked while a run trains.
QUESTIONS = "questions"
_decode = msgspec.msgpack.Decoder(Turn).decode
_encode = msgspec.msgpack.Encoder().encode


class TurnKey(NamedTuple):
    """Names a turn. `turn`: how many times the round began before. `kind`: as in ReadyRequest."""

    run: str
    round: int
    turn: int
    kind: str = "train"


def key_of(turn: Turn) -> TurnKey:
    return TurnKey(turn.ready.run, turn.ready.round, turn.ready.turn, turn.ready.kind)


class TurnStore:
    """The file. Used by several threads. Raises HomeError if it cannot be used, DiskFull."""

    def __init__(self, home: Path) -> None:
        self._path, self._lock = home / FILE, RLock()
        #: Whether the log may have deleted secrets, also of a process that was killed.
        self._has_deleted = True
        try:
            self._path.touch(0o600)
            self._path.chmod(0o600)
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            # A commit to a write-ahead log takes one fsync; without the log, it takes five.
            # `_purge` empties the log, and deleted secrets are overwritten with zeros. Free blocks
            # of an unencrypted disk may have some.
            self._db.executescript(
                """
                PRAGMA journal_mode=WAL; PRAGMA synchronous=EXTRA; PRAGMA secure_delete=ON;
                CREATE TABLE IF NOT EXISTS turns (
                    number INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL,
                    turn INTEGER NOT NULL, kind TEXT NOT NULL, state BLOB,
                    UNIQUE (run, round, turn, kind));
                """
            )
        except (OSError, sqlite3.DatabaseError) as err:
            raise self._error(err) from err
        self._purge()

    def close(self) -> None:
        self._db.close()

    def get(self, key: TurnKey) -> Turn | None:
        """The turn, or None if there was none. Raises SecureRefused if it is over."""
        rows = self._execute(
            "SELECT state FROM turns WHERE run = ? AND round = ? AND turn = ? AND kind = ?", key
        )
        if not rows:
            return None
        if rows[0][0] is None:
            raise SecureRefused(
                "over",
                f"turn {key.turn} of round {key.round} is over for this peer, and its keys are "
                "deleted",
                "ask the peer for a new turn; a restored coordinator does so automatically",
            )
        return self._read(rows[0][0])

    def _read(self, state: bytes) -> Turn:
        try:
            return _decode(state)
        except msgspec.DecodeError as err:
            raise self._error(err) from err

    def newest(self, run: str) -> Turn | None:
        """The newest turn of a run. None if there was none, or if the run is over here."""
        rows = self._execute(
            "SELECT state FROM turns WHERE run = ? ORDER BY number DESC LIMIT 1", (run,)
        )
        return self._read(rows[0][0]) if rows and rows[0][0] is not None else None

    def begin(self, turn: Turn) -> None:
        """Record a new turn, and delete the secrets of the older turns of its run."""
        failpoint("agent.secure.recording", "begin")
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                self._delete("run = ?", turn.ready.run)
                self._execute(
                    "INSERT INTO turns (run, round, turn, kind, state) VALUES (?, ?, ?, ?, ?)",
                    (*key_of(turn), _encode(turn)),
                )
                self._execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        failpoint("agent.secure.recorded", "begin")
        self._purge()

    def advance(self, old: Turn, new: Turn, step: str) -> None:
        """Replace the state by that after a step. Raises SecureRefused if it has changed since.

        With the last answer, `told`, the state no longer has its secrets.
        """
        if new == old:
            return
        erased = {"master"} if new.told is not None else set[str]()
        if any(
            was and name not in erased and getattr(old, name) != getattr(new, name)
            for name, was in msgspec.structs.asdict(old).items()
        ):
            raise SecureRefused("recorded", f"step {step} would change what this peer has recorded")
        failpoint("agent.secure.recording", step)
        changed = self._execute(
            "UPDATE turns SET state = ? WHERE run = ? AND round = ? AND turn = ? AND kind = ? "
            "AND state = ? RETURNING number",
            (_encode(new), *key_of(old), _encode(old)),
        )
        if not changed:
            raise SecureRefused("recorded", f"another step was taken in place of {step}")
        failpoint("agent.secure.recorded", step)
        self._has_deleted |= new.told is not None
        self._purge()

    def end_run(self, run: str) -> None:
        """Delete the secrets of all turns of a run."""
        self._delete("run = ?", run)
        self._purge()

    def end_others(self, run: str = "") -> None:
        """Delete the secrets of all turns of other runs; of all runs without a name."""
        self._delete("run != ?", run)
        self._purge()

    def _delete(self, which: str, run: str) -> None:
        """Delete the states of turns; call `_purge` once this is committed."""
        deleted = self._execute(
            f"UPDATE turns SET state = NULL WHERE {which} AND state NOT NULL RETURNING number",
            (run,),
        )
        self._has_deleted |= bool(deleted)

    def _purge(self) -> None:
        """Move the write-ahead log into the file and empty it, if it has deleted secrets."""
        with self._lock:
            if self._has_deleted:
                self._execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._has_deleted = False

    def _execute(self, statement: str, arguments: Sequence[object] = ()) -> list[tuple[bytes]]:
        try:
            with self._lock:
                return self._db.execute(statement, arguments).fetchall()
        except sqlite3.DatabaseError as err:
            raise self._error(err) from err

    def _error(self, err: Exception) -> DiskFull | HomeError:
        return database_error(
            self._path,
            err,
            "do not delete it during a secure run: the agent could then answer twice. "
            "Leave the run first",
        )


def forget_all(home: Path) -> None:
    """Delete all secrets of secure sums in a home that leaves its fleet; what was begun is kept."""
    for folder in (home, home / QUESTIONS):
        if (folder / FILE).exists():
            with closing(TurnStore(folder)) as store:
                store.end_others()
