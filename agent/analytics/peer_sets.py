"""With which peers this agent has told sums about its columns. One SQLite file, fully synchronous.

A sum over four peers less the same sum over three of them is what the fourth one told. So this
agent answers about a column alone or in secure sums, never in both ways; and the sets of peers of
its secure sums must not differ in a few peers that its owner trusts, nor their sums and differences
(`linear_audit`, with peers in place of rows). A peer that tells nothing of a column adds 0 to its
sums, so it is in no set there. Peers that the owner does not trust do not count: if one has left
for good, the owners remove it from their trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from agent.analytics import linear_audit
from agent.data.private_database import open_database
from protocols.analytics.query import Query
from protocols.errors import Refused, SecureRefused
from protocols.privacy import question_layout
from protocols.privacy.question_layout import ToldBy
from protocols.privacy.secagg.cohort import Pins

_SCHEMA = """
CREATE TABLE IF NOT EXISTS alone (column TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS sums (column TEXT, peers TEXT, PRIMARY KEY (column, peers));
"""
#: Sets of peers for each column; after that the agent refuses new ones.
MAX_SETS = 64


def file_beside(log: Path) -> Path:
    """The file, beside that of the log of answers."""
    return log.with_name("peer_sets.db")


def columns_of(question: Query) -> tuple[str, ...]:
    """What a question tells of: its columns, or "" for the number of rows alone."""
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
        """Raise Refused if something of a column was told in a secure sum."""
        for name in columns:
            if self._find("sums", name):
                raise Refused(
                    f"this machine tells of {_words(name)} in secure sums alone: with an answer of "
                    "its own, the sum of the other peers would be known",
                    "commonweight analyze --secure",
                )

    def tell_alone(self, columns: Iterable[str]) -> None:
        """Record that an answer of this machine alone is about these columns."""
        self._db.executemany("INSERT OR IGNORE INTO alone VALUES (?)", [(c,) for c in columns])

    def check_in_sums(self, columns: Iterable[str]) -> None:
        """Raise Refused if something of a column was told by this machine alone."""
        for name in columns:
            if self._find("alone", name):
                raise Refused(
                    f"this machine has answered a question without --secure about {_words(name)}: "
                    "its part of a sum could be computed",
                    "owners who want secure sums alone: commonweight-agent policy set secure_min 3",
                )

    def sets(self, columns: Iterable[str]) -> list[tuple[str, ...]]:
        """The sets of peers of the sums that were told about these columns, each once."""
        found: dict[tuple[str, ...], None] = {}
        for name in columns:
            rows = self._db.execute(
                "SELECT peers FROM sums WHERE column = ? ORDER BY rowid", (name,)
            )
            found |= dict.fromkeys(tuple(json.loads(peers)) for (peers,) in rows)
        return [*found]

    def check(self, told: ToldBy, me: str, pins: Pins) -> None:
        """Raise SecureRefused if these sums and earlier ones together would isolate a few peers."""
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

    def tell(self, told: ToldBy, me: str, pins: Pins) -> None:
        """Record sums before they can be unmasked. Raises Refused, SecureRefused."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self.check_in_sums(told)
            self.check(told, me, pins)
            self._db.executemany(
                "INSERT OR IGNORE INTO sums VALUES (?, ?)",
                [(name, json.dumps(sorted(one))) for name, sets in told.items() for one in sets],
            )
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _find(self, table: str, column: str) -> bool:
        found = self._db.execute(f"SELECT 1 FROM {table} WHERE column = ? LIMIT 1", (column,))
        return found.fetchone() is not None


def _words(column: str) -> str:
    return f"column {column!r}" if column else "its number of rows"
