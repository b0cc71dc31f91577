"""The log of answers: what was asked and released, and sets of rows.

What answers with noise cost is in the owner's ledger (`agent.home.privacy_ledger`).

SQLite, fully synchronous: an answer is recorded before it is released, so no kill or restart loses
it. The file belongs to the owner (0600) and never leaves the machine.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from agent.analytics.cut_points import CutPoints
from agent.analytics.peer_sets import PeerSets, file_beside
from agent.analytics.time_bins import TimeBins
from agent.data.disclosed_sets import Numbers, pack, unpack
from agent.data.private_database import open_database
from agent.home import settings
from agent.home.privacy_ledger import PrivacyLedger
from protocols.analytics.mergeable_states import Floats, PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import Refused
from protocols.messages.envelope import strip_controls

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  id INTEGER PRIMARY KEY, at REAL, digest TEXT, data TEXT, question TEXT, told BLOB,
  cells INTEGER, bytes INTEGER, epsilon REAL, refused TEXT
);
CREATE TABLE IF NOT EXISTS told_rows (column TEXT, rows BLOB);
CREATE TABLE IF NOT EXISTS known_cells (digest TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS thresholds (
  column TEXT, threshold REAL, is_cut INTEGER, PRIMARY KEY (column, threshold)
);
CREATE TABLE IF NOT EXISTS equations (column TEXT PRIMARY KEY, count INTEGER);
CREATE TABLE IF NOT EXISTS wishes (
  digest TEXT PRIMARY KEY, at REAL, question TEXT, allowed INTEGER
);
"""


#: Another question may hold the lock for this long.
_WAIT_S = 1800.0
#: Beyond this size no new answer is given. An answer has at most 2 MiB.
MAX_LOG_BYTES = 1 << 28
#: Refusals and repeated answers that are kept, and the characters of their questions: a requester
#: can repeat them without limit.
MAX_KEPT_REPEATS, _MAX_REPEAT_CHARS = 1000, 2000
#: Questions that wait for the owner's decision; a new one takes the place of the oldest.
MAX_WISHES = 100
#: Entries without an answer of their own.
_REPEATS = "(refused != '' OR LENGTH(told) = 0)"


def log_file(home: Path) -> Path:
    """The file of the log in a home, in the folder of what was told."""
    return settings.memory_file(home).with_name("analysis.db")


class ToldColumn(NamedTuple):
    """Rows about which something was disclosed in `column`; empty for all columns."""

    column: str
    rows: Numbers


class QuestionContext(NamedTuple):
    """How a question was asked: its job and fleet, whether its answer leaves in a sum alone, and
    the text of the method that it is a part of, as the requester says."""

    job: str = ""
    fleet: str = ""
    secure: bool = False
    method: str = ""


class Entry(NamedTuple):
    """A line of the log: the query and the size of its answer (`bytes`), or why it was refused.

    `secure`: only sums with the answers of other peers have left. `method`: see `QuestionContext`.
    """

    at: float
    question: str
    cells: int
    bytes: int
    epsilon: float
    refused: str
    secure: bool = False
    method: str = ""


class QueryLog:
    """One file; used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, _SCHEMA, _WAIT_S)
        there = {row[1] for row in self._db.execute("PRAGMA table_info(answers)")}
        for name in ("secure INTEGER", "method TEXT"):
            if name.split()[0] not in there:  # a log of an older version
                self._db.execute(f"ALTER TABLE answers ADD COLUMN {name}")
        self.ledger = PrivacyLedger(path.with_name("privacy.db"))
        self.peer_sets, self.time_bins = PeerSets(file_beside(path)), TimeBins(self._db)

    def close(self) -> None:
        self.peer_sets.close()
        self.ledger.close()
        self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction; other processes wait to write, and an error rolls it back."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def told_figures(self) -> list[ToldColumn]:
        """The sets of rows that released figures describe; `disclosed_sets` has those of cells."""
        rows = self._db.execute("SELECT column, rows FROM told_rows ORDER BY rowid").fetchall()
        return [ToldColumn(column, unpack(packed)) for column, packed in rows]

    def is_known_cells(self, question: Query) -> bool:
        """True if a query about the same cells was answered for exactly their rows."""
        found = self._db.execute(
            "SELECT 1 FROM known_cells WHERE digest = ?", (_cells_of(question),)
        ).fetchone()
        return found is not None

    def remember_cells(self, question: Query) -> None:
        self._db.execute("INSERT OR IGNORE INTO known_cells VALUES (?)", (_cells_of(question),))

    def spend_equations(self, columns: Sequence[str], count: int) -> int:
        """Add equations, which a model tells or is refused, to the count of each of the columns.

        Returns the number of those before, the most about any of the columns.
        """
        rows = self._db.execute("SELECT column, count FROM equations").fetchall()
        told: dict[str, int] = dict(rows)
        self._db.executemany(
            "INSERT OR REPLACE INTO equations VALUES (?, ?)",
            [(name, told.get(name, 0) + count) for name in columns],
        )
        return max(told.get(name, 0) for name in columns)

    def cuts(self, column: str, values: Floats, min_rows: int) -> CutPoints:
        """The cuts of a column of numbers, with the values that it has now."""
        asked = self._db.execute(
            "SELECT threshold, is_cut FROM thresholds WHERE column = ?", (column,)
        ).fetchall()

        def remember(threshold: float, is_cut: bool) -> None:
            self._db.execute(
                "INSERT OR REPLACE INTO thresholds VALUES (?, ?, ?)", (column, threshold, is_cut)
            )

        cuts = [threshold for threshold, is_cut in asked if is_cut]
        return CutPoints(
            column, values, min_rows, cuts, [threshold for threshold, _ in asked], remember
        )

    @property
    def spent_epsilon(self) -> float:
        """The sum of ε of all answers with noise, which bounds what they reveal together."""
        return self.ledger.asked_epsilon()

    def find_answer(self, question: Query, data: str) -> PeerAnswer | None:
        """The earlier answer to the same query on the same data; to repeat it costs nothing."""
        row = self._db.execute(
            f"SELECT told FROM answers WHERE digest = ? AND data = ? AND NOT {_REPEATS} LIMIT 1",
            (question.digest, data),
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=PeerAnswer)

    def check_room(self) -> None:
        """Raise Refused if the log is too large for new answers."""
        (pages,), (free,), (size,) = (
            self._db.execute(f"PRAGMA {name}").fetchone()
            for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size > MAX_LOG_BYTES:
            raise Refused(
                "this peer has answered so many questions that its log is full",
                "repeat questions that it has answered",
            )

    def record(
        self,
        question: Query,
        data: str,
        told: PeerAnswer,
        sets: Sequence[ToldColumn] = (),
        asked: QuestionContext = QuestionContext(),
    ) -> bytes:
        """Record an answer inside `writing`; returns its bytes, to release after the commit."""
        body = msgspec.json.encode(told)
        self._insert(question, data, told, body, b"" if told.refused else body, asked)
        self._db.executemany(
            "INSERT INTO told_rows VALUES (?, ?)", [(one.column, pack(one.rows)) for one in sets]
        )
        return body

    def repeat(
        self,
        question: Query,
        data: str,
        told: PeerAnswer,
        asked: QuestionContext = QuestionContext(),
    ) -> bytes:
        """As `record`, for an answer that `find_answer` has found; it costs no noise again."""
        body = msgspec.json.encode(told)
        self._insert(replace(question, epsilon=0.0), data, told, body, b"", asked)
        return body

    def _insert(
        self,
        question: Query,
        data: str,
        told: PeerAnswer,
        body: bytes,
        stored: bytes,
        asked: QuestionContext,
    ) -> None:
        text = str(question)
        if not stored and len(text) > _MAX_REPEAT_CHARS:
            text = f"{text[:_MAX_REPEAT_CHARS]}…"
        self._db.execute(
            "INSERT INTO answers (at, digest, data, question, told, cells, bytes, epsilon,"
            " refused, secure, method) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                time.time(),
                question.digest,
                data,
                text,
                stored,
                len(told.cells),
                len(body),
                0.0 if told.refused else question.epsilon,
                told.refused,
                asked.secure,
                strip_controls(asked.method),
            ),
        )
        if not stored:
            self._db.execute(
                f"DELETE FROM answers WHERE {_REPEATS} AND id <= (SELECT id FROM answers WHERE"
                f" {_REPEATS} ORDER BY id DESC LIMIT 1 OFFSET {MAX_KEPT_REPEATS})"
            )

    def entries(self) -> list[Entry]:
        """The log, oldest first."""
        rows = self._db.execute(
            "SELECT at, question, cells, bytes, epsilon, refused, COALESCE(secure, 0),"
            " COALESCE(method, '') FROM answers ORDER BY id"
        )
        return [Entry(*row)._replace(secure=bool(row[6])) for row in rows]

    # --- approval by the owner ---

    def is_allowed(self, question: Query) -> bool:
        """True if the owner has allowed this query; otherwise stores it for the owner.

        Older versions left out part of the query, so what was allowed then must be allowed again.
        """
        text = str(question)
        self._db.execute(
            "INSERT INTO wishes VALUES (?, ?, ?, NULL) ON CONFLICT (digest) DO UPDATE SET"
            " question = excluded.question, allowed = NULL WHERE question != excluded.question",
            (question.digest, time.time(), text),
        )
        self._db.execute(
            "DELETE FROM wishes WHERE digest IN (SELECT digest FROM wishes WHERE allowed IS NULL"
            f" ORDER BY at DESC LIMIT -1 OFFSET {MAX_WISHES})"
        )
        (allowed,) = self._db.execute(
            "SELECT allowed FROM wishes WHERE digest = ?", (question.digest,)
        ).fetchone()
        return bool(allowed)

    def approval_requests(self) -> list[tuple[str, str, bool | None]]:
        """Queries that need the owner's approval: digest, text, decision (None: open)."""
        rows = self._db.execute("SELECT digest, question, allowed FROM wishes ORDER BY at")
        return [(d, words, None if yes is None else bool(yes)) for d, words, yes in rows]

    def decide(self, digest: str, allowed: bool) -> bool:
        """Store the decision on a query, by the start of its digest.

        False unless exactly one query has it, because a requester can construct queries with equal
        starts.
        """
        wishes = self._db.execute("SELECT digest FROM wishes").fetchall()
        found = [known for (known,) in wishes if known.startswith(digest)]
        if len(found) != 1:
            return False
        self._db.execute("UPDATE wishes SET allowed = ? WHERE digest = ?", (allowed, found[0]))
        return True


def _cells_of(question: Query) -> str:
    """A digest of what selects the cells of a query."""
    return hashlib.sha256(msgspec.json.encode([question.by, question.where])).hexdigest()
