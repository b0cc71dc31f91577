"""The sets of peers whose sums about a column this agent took part in. One SQLite file, fully
synchronous.

A sum over four peers less the same sum over three of them is what the fourth one told. So this
agent answers about a column alone or in secure sums, never in both ways; and the sets of peers of
its secure sums must not differ in a few peers that its owner trusts, nor their sums and differences
(`linear_audit`, with peers in place of rows). A peer that tells nothing of a column adds 0 to its
sums, so it is in no set there. Peers that the owner does not trust do not count: if one has left
for good, the owners remove it from their trust.

The same peers may tell sums over different rows, such as with and without a condition. They may
differ in the rows of enough peers, or of none (`row_sets`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from agent.analytics import linear_audit, row_sets
from agent.data.disclosed_sets import Numbers, pack, unpack
from agent.data.private_database import open_database, writing
from protocols.analytics.mergeable_states import IN_SUMS_ALONE
from protocols.analytics.query import Query
from protocols.analytics.row_sets import RowSet
from protocols.errors import Refused, SecureRefused
from protocols.privacy import question_layout
from protocols.privacy.question_layout import ToldBy
from protocols.privacy.question_rows import REST, ROWS, About, SumRows, Sums
from protocols.privacy.secagg.cohort import Pins

_ROWS = msgspec.json.Decoder(SumRows)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS alone (column TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS sums (column TEXT, peers TEXT, PRIMARY KEY (column, peers));
CREATE TABLE IF NOT EXISTS row_sets (number INTEGER PRIMARY KEY, rows BLOB);
CREATE TABLE IF NOT EXISTS row_sums (
  column TEXT, of TEXT, rows TEXT, PRIMARY KEY (column, of, rows)
);
"""
#: Sets of peers for each column, sums over different rows about it, and numbers of rows of all
#: columns; after that the agent refuses new ones.
MAX_SETS, MAX_SUMS, MAX_COUNTS = 64, 256, 512


def file_beside(log: Path) -> Path:
    """The file, beside that of the log of answers."""
    return log.with_name("peer_sets.db")


def columns_of(question: Query) -> tuple[str, ...]:
    """What a question is about: its columns, or "" for the number of rows alone."""
    if question_layout.names_only(question):
        return ()
    return question.columns or ("",)


class PeerSets:
    """One file; used by one thread at a time. `columns`: as from `columns_of`."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, _SCHEMA)

    def close(self) -> None:
        self._db.close()

    def check_alone(self, columns: Iterable[str]) -> None:
        """Raise Refused if a secure sum has disclosed something about a column."""
        for name in columns:
            if self._find("sums", name):
                raise Refused(
                    f"this machine tells of {_words(name)} {IN_SUMS_ALONE}: with an answer of its "
                    "own, the sum of the other peers would be known",
                    "ask the same with --secure",
                )

    def tell_alone(self, columns: Iterable[str]) -> None:
        """Record that an answer of this machine alone is about these columns."""
        self._db.executemany("INSERT OR IGNORE INTO alone VALUES (?)", [(c,) for c in columns])

    def check_in_sums(self, columns: Iterable[str]) -> None:
        """Raise Refused if an answer of this machine alone was about a column."""
        for name in columns:
            if self._find("alone", name):
                raise Refused(
                    f"this machine has answered a question without --secure about {_words(name)}: "
                    "its part of a sum could be computed",
                    "owners who want secure sums alone: commonweight-agent policy set secure_min 3",
                )

    def sets(self, columns: Iterable[str]) -> list[tuple[str, ...]]:
        """The sets of peers of earlier sums about these columns, each once."""
        found: dict[tuple[str, ...], None] = {}
        for name in columns:
            rows = self._db.execute(
                "SELECT peers FROM sums WHERE column = ? ORDER BY rowid", (name,)
            )
            found |= dict.fromkeys(tuple(json.loads(peers)) for (peers,) in rows)
        return [*found]

    def number_rows(self, sets: Sequence[Numbers]) -> list[RowSet]:
        """These sets of rows in the form that others may see. New ones are on disk when this
        returns.

        Raises Refused if there are too many.
        """
        with writing(self._db):
            stored = dict(self._db.execute("SELECT number, rows FROM row_sets"))
            basis = {number: unpack(rows) for number, rows in stored.items()}
            found = row_sets.number_sets(basis, sets)
            self._db.executemany(
                "INSERT INTO row_sets VALUES (?, ?)",
                [(number, pack(rows)) for number, rows in basis.items() if number not in stored],
            )
        return found

    def check(self, told: ToldBy, rows: Sums, me: str, pins: Pins) -> None:
        """Raise SecureRefused if these sums and earlier ones together would isolate a few peers, or
        rows of a few."""
        self._check_peers(told, me, pins)
        known = self._row_sums()
        for about in (one for one in rows if one != REST):  # those of one column first, to name it
            # A condition counts the rows of a category, too.
            alike = (about, ROWS) if about.is_count else (about,)
            self._check_rows(about.column, _pick(known, alike), _pick(rows, alike), me, pins)
        counts = [about for about in {**known, **rows} if about.is_count or about == ROWS]
        rest = _pick(known, (REST,)) | _pick(rows, (REST,))
        self._check_rows(None, _pick(known, counts) | rest, _pick(rows, counts), me, pins)

    def _check_rows(
        self, column: str | None, before: set[SumRows], asked: set[SumRows], me: str, pins: Pins
    ) -> None:
        """Raise SecureRefused if these sums would isolate rows of a few. `column`: what they are
        about; None for numbers of rows, of all columns."""
        if not (new := asked - before):
            return
        most = MAX_COUNTS if column is None else MAX_SUMS
        if len(before) + len(new) > most:
            raise SecureRefused(
                "other rows",
                f"sums over {most} different sets of rows have told of {_words(column or '')}",
                "repeat questions that it has answered",
            )
        if row_sets.isolates_few([*before], [*new], pins.peers | {me}, pins.minimum):
            raise SecureRefused(
                "other rows",
                f"{_sums(column)} are over rows of fewer than {pins.minimum} trusted peers",
                f"ask about rows that differ at {pins.minimum} peers or more, or at none: "
                "without conditions and groups that few peers have; if rows are new, ask when "
                "more peers have new ones",
            )

    def _row_sums(self) -> Sums:
        found: Sums = {}
        for column, of, rows in self._db.execute("SELECT column, of, rows FROM row_sums"):
            found.setdefault(About(column, of), set()).add(_ROWS.decode(rows))
        return found

    def _check_peers(self, told: ToldBy, me: str, pins: Pins) -> None:
        trusted = pins.peers | {me}
        number = {peer: i for i, peer in enumerate(sorted(trusted))}
        for name, sets in told.items():
            known = [trusted.intersection(found) for found in self.sets([name])]
            new = [one for one in {trusted & peers for peers in sets} if one not in known]
            if not new:
                continue
            if len(known) + len(new) > MAX_SETS:
                raise SecureRefused(
                    "other peers", f"too many sets of peers have told of {_words(name)}"
                )
            before, more = (
                [np.sort(np.array([number[p] for p in one], np.int64)) for one in some]
                for some in (known, new)
            )
            if linear_audit.isolates_few(before, [*before, *more], pins.minimum):
                raise SecureRefused(
                    "other peers",
                    f"earlier sums about {_words(name)} were of other peers, or a peer has no rows "
                    "that this question is about; together with this sum they would tell that of "
                    f"fewer than {pins.minimum} trusted peers",
                    "ask when the same peers are online, or as many others, and about rows that "
                    "each has; if one has left for good, each owner: commonweight-agent trust "
                    "remove ID",
                )

    def tell(self, told: ToldBy, rows: Sums, me: str, pins: Pins) -> None:
        """Record sums before they can be unmasked. Raises Refused, SecureRefused."""
        with writing(self._db):
            self.check_in_sums(told)
            self.check(told, rows, me, pins)
            self._db.executemany(
                "INSERT OR IGNORE INTO sums VALUES (?, ?)",
                [(name, json.dumps(sorted(one))) for name, sets in told.items() for one in sets],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO row_sums VALUES (?, ?, ?)",
                [
                    (*about, msgspec.json.encode(one).decode())
                    for about, sums in rows.items()
                    for one in sums
                ],
            )

    def _find(self, table: str, column: str) -> bool:
        found = self._db.execute(f"SELECT 1 FROM {table} WHERE column = ? LIMIT 1", (column,))
        return found.fetchone() is not None


def _pick(sums: Sums, some: Iterable[About]) -> set[SumRows]:
    return {one for about in some for one in sums.get(about, ())}


def _sums(column: str | None) -> str:
    """Which sums are compared: those about a column, or numbers of rows of all."""
    if column:
        about = _words(column)
        return f"the sums of this question about {about}, or their differences from earlier ones,"
    return "the sums of this question, or differences of its numbers of rows from earlier ones,"


def _words(column: str) -> str:
    return f"column {column!r}" if column else "its number of rows"
