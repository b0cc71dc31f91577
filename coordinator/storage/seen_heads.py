"""What peers have signed that they saw of our log: countersignatures of the ledger.

One file beside the ledger. Of each peer it keeps the newest statement, and one for each stretch of
the ledger, so that a ledger that was rewritten contradicts them (`admin.audit`).
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import NamedTuple

from protocols.errors import HomeError
from protocols.messages.version_log import LogHead

FILE = "seen.db"
#: Entries of the ledger for which one statement of a peer is kept.
_STRETCH = 1000
#: Peers of which a finished stretch keeps a statement: a few suffice to contradict a forged ledger,
#: and those of thousands of peers over years would fill the disk.
MAX_IN_STRETCH = 32


class StoredStatement(NamedTuple):
    """A peer's statement (`p2p.seen_heads`) about a head over `ledger` entries of the ledger; or
    about so many charges of its owner."""

    peer: str
    ledger: int
    data: bytes


class SeenHeads:
    """The statements in a home. Raises HomeError if the file cannot be used."""

    def __init__(self, home: Path, *, read_only: bool = False) -> None:
        path = home / FILE
        self._path = path
        try:
            mode = "ro" if read_only else "rwc"
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            if not read_only:
                path.chmod(0o600)
                self._db.executescript(
                    """
                    PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
                    CREATE TABLE IF NOT EXISTS seen (
                        peer TEXT, epoch INTEGER, stretch INTEGER, ledger INTEGER, data BLOB,
                        PRIMARY KEY (peer, epoch, stretch));
                    CREATE INDEX IF NOT EXISTS seen_stretch ON seen (epoch, stretch);
                    CREATE TABLE IF NOT EXISTS charged (
                        peer TEXT PRIMARY KEY, count INTEGER, data BLOB);
                    """
                )
        except sqlite3.DatabaseError as err:
            raise HomeError(
                f"{path} cannot be used: {err}",
                "move it away: the agents still have what they signed",
            ) from err

    def add(self, peer: str, head: LogHead, data: bytes) -> None:
        """Keep a verified statement of a peer. A full disk loses it, and the peer keeps it."""
        place = head.epoch, head.ledger // _STRETCH
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?, ?)",
                (peer, *place, head.ledger, data),
            )
            # The peer's last one before this is kept no longer if enough others have one there.
            self._db.execute(
                "DELETE FROM seen WHERE peer = ?1 AND (epoch, stretch) = (SELECT epoch, stretch "
                "FROM seen WHERE peer = ?1 AND (epoch, stretch) < (?2, ?3) "
                "ORDER BY epoch DESC, stretch DESC LIMIT 1) AND (SELECT COUNT(*) FROM seen AS one "
                "WHERE one.epoch = seen.epoch AND one.stretch = seen.stretch) > ?4",
                (peer, *place, MAX_IN_STRETCH),
            )
        except sqlite3.OperationalError:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def add_charged(self, peer: str, count: int, data: bytes) -> StoredStatement:
        """Keep a verified statement about a peer's charges (`messages.work.ChargedHead`) if it has
        more than its last one; returns the one with the most. A full disk loses it."""
        row = self._db.execute(
            "SELECT peer, count, data FROM charged WHERE peer = ?", (peer,)
        ).fetchone()
        if row is not None and row[1] >= count:
            return StoredStatement(*row)
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("INSERT OR REPLACE INTO charged VALUES (?, ?, ?)", (peer, count, data))
        return StoredStatement(peer, count, data)

    def all(self) -> list[StoredStatement]:
        """All statements, oldest first."""
        rows = self._db.execute("SELECT peer, ledger, data FROM seen ORDER BY epoch, ledger")
        return [StoredStatement(*row) for row in rows]

    def close(self) -> None:
        self._db.close()
