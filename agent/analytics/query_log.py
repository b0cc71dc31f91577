"""What this peer has told, kept on its own disk: the audit log, sets of rows, noise, and ε spent.

SQLite, fully synchronous: an answer is written down before it is told, so that neither a kill nor a
restart forgets what somebody knows. The file is the owner's (0600) and never leaves.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from agent.analytics.disclosure_control import Bits
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  id INTEGER PRIMARY KEY, at REAL, digest TEXT, data TEXT, question TEXT, told BLOB,
  cells INTEGER, bytes INTEGER, epsilon REAL, refused TEXT
);
CREATE TABLE IF NOT EXISTS sets (bits BLOB);
CREATE TABLE IF NOT EXISTS wishes (
  digest TEXT PRIMARY KEY, at REAL, question TEXT, allowed INTEGER
);
"""


class Entry(NamedTuple):
    """A line of the audit log: what was asked, and what left (`bytes`), or why nothing did."""

    at: float
    question: str
    cells: int
    bytes: int
    epsilon: float
    refused: str


class QueryLog:
    """One file; used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    def disclosed_sets(self) -> list[Bits]:
        """Sets of rows that were told of without noise."""
        rows = self._db.execute("SELECT bits FROM sets").fetchall()
        return [np.frombuffer(bits, np.uint8) for (bits,) in rows]

    @property
    def spent_epsilon(self) -> float:
        """ε of all answers with noise: what they tell together is bounded by the sum."""
        (total,) = self._db.execute("SELECT COALESCE(SUM(epsilon), 0) FROM answers").fetchone()
        return float(total)

    def find_answer(self, question: Query, data: str) -> PeerAnswer | None:
        """What was told when the same was asked of the same data: it is told again, at no cost."""
        row = self._db.execute(
            "SELECT told FROM answers WHERE digest = ? AND data = ? AND refused = '' LIMIT 1",
            (question.digest, data),
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=PeerAnswer)

    def record(self, question: Query, data: str, told: PeerAnswer, sets: Sequence[Bits]) -> bytes:
        """Write an answer down; its bytes, which may be told from now on."""
        body = msgspec.json.encode(told)
        epsilon = 0.0 if told.refused else question.epsilon
        with self._transaction():
            self._db.execute(
                "INSERT INTO answers (at, digest, data, question, told, cells, bytes, epsilon,"
                " refused) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    time.time(),
                    question.digest,
                    data,
                    str(question),
                    body,
                    len(told.cells),
                    len(body),
                    epsilon,
                    told.refused,
                ),
            )
            self._db.executemany("INSERT INTO sets VALUES (?)", [(b.tobytes(),) for b in sets])
        return body

    def entries(self) -> list[Entry]:
        """The audit log, oldest first."""
        rows = self._db.execute(
            "SELECT at, question, cells, bytes, epsilon, refused FROM answers ORDER BY id"
        )
        return [Entry(*row) for row in rows]

    # --- an owner who wants to be asked ---

    def is_allowed(self, question: Query) -> bool:
        """True if the owner has allowed this question; else it is noted for the owner."""
        self._db.execute(
            "INSERT OR IGNORE INTO wishes VALUES (?, ?, ?, NULL)",
            (question.digest, time.time(), str(question)),
        )
        (allowed,) = self._db.execute(
            "SELECT allowed FROM wishes WHERE digest = ?", (question.digest,)
        ).fetchone()
        return bool(allowed)

    def approval_requests(self) -> list[tuple[str, str, bool | None]]:
        """Questions that the owner was asked about: digest, words, what was decided."""
        rows = self._db.execute("SELECT digest, question, allowed FROM wishes ORDER BY at")
        return [(d, words, None if yes is None else bool(yes)) for d, words, yes in rows]

    def decide(self, digest: str, allowed: bool) -> bool:
        """What the owner says of a question (a beginning of its digest); False if none is it."""
        done = self._db.execute(
            "UPDATE wishes SET allowed = ? WHERE digest LIKE ? || '%'", (allowed, digest)
        )
        return done.rowcount > 0

    def _transaction(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db
