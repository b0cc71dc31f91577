"""Numbers for the rows of a table that stay the same over time, in a file in the agent's home.

A row keeps its number when the file is sorted, moved, converted or gets more rows or columns. A row
that was edited is another row. Equal rows have different numbers. The file (0600) holds a keyed
hash of each row, no value, and never leaves the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agent.data import helper_requests
from agent.data.disclosed_sets import GOLDEN, Numbers, pack, unpack
from agent.data.private_database import open_database, writing
from agent.data.reader import Reader
from protocols.errors import DataError

Hashes = npt.NDArray[np.uint64]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS registry (name TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS row_hashes (id INTEGER PRIMARY KEY, hashes BLOB, numbers BLOB);
CREATE TABLE IF NOT EXISTS read_tables (
  fingerprint TEXT PRIMARY KEY, at INTEGER, numbers BLOB
);
"""
#: The tables whose numbers are kept, so that an unchanged file is not hashed row by row again.
_KEPT_TABLES = 4


class RowRegistry:
    """The numbers of all rows that were ever seen, in the order of first sight, from 0.

    It hashes the rows where they are; the file belongs to a `RowStore`.
    """

    def __init__(self, path: Path) -> None:
        self._store = helper_requests.stores() or RowStore(path)
        self._secret = self._store.secret()

    def close(self) -> None:
        self._store.close()

    def positions(self, reader: Reader) -> Numbers:
        """The number of each row, int64[n] in the reader's order. Raises DataError."""
        fingerprint = reader.fingerprint()
        if (known := self._store.known_table(fingerprint)) is not None:
            return known
        names = sorted(reader.columns())
        before = self._store.columns()
        # A table with more columns than before still has the rows that it had.
        narrower = before if before and before != names and set(before) <= set(names) else []
        from agent.data import row_hashes  # needs pyarrow, which folders of files do not

        full, narrow = row_hashes.hash_rows(reader, (names, narrower), self._secret)
        if reader.fingerprint() != fingerprint:
            raise DataError("the table changed while it was read", "the next try reads it again")
        return self._store.register(
            fingerprint, _tell_apart(full), _tell_apart(narrow) if narrower else None, names
        )

    def file_numbers(self, files: Sequence[tuple[str, Path]]) -> Numbers:
        """The number of each file, int64[n]: of its label and content, whatever its name is."""
        stamps = hashlib.blake2b(digest_size=16)
        for label, path in files:
            stamps.update(f"{label}\n{path}\n{_stamp(path)}\n".encode(errors="surrogateescape"))
        fingerprint = f"files {stamps.hexdigest()}"
        if (known := self._store.known_table(fingerprint)) is not None:
            return known
        digests = [self._hash_file(label, path) for label, path in files]
        full = np.frombuffer(b"".join(digests), np.uint64)
        return self._store.register(fingerprint, _tell_apart(full), None, ())

    def _hash_file(self, label: str, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, hashlib.blake2b).digest()
        except OSError:  # the task cannot read it either
            content = os.fsencode(path)
        words = label.encode(errors="surrogateescape") + b"\0" + content
        return hashlib.blake2b(words, digest_size=8, key=self._secret).digest()


class RowStore:
    """The file of the registry."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, _SCHEMA)
        self._db.execute(
            "INSERT OR IGNORE INTO registry VALUES ('secret', ?)", (secrets.token_bytes(32),)
        )

    def close(self) -> None:
        self._db.close()

    def secret(self) -> bytes:
        """The key of the hashes."""
        return self._get("secret")

    def columns(self) -> list[str]:
        """The columns of the table that was read last, sorted."""
        return [str(name) for name in json.loads(self._get("columns") or b"[]")]

    def known_table(self, fingerprint: str) -> Numbers | None:
        """The numbers of a table's rows, if it is one of those that were read last."""
        row = self._db.execute(
            "SELECT numbers FROM read_tables WHERE fingerprint = ?", (fingerprint,)
        ).fetchone()
        return None if row is None else unpack(row[0])

    def count(self) -> int:
        """How many numbers there are."""
        _, numbers = self._stored()
        return int(numbers.max()) + 1 if len(numbers) else 0

    def register(
        self,
        fingerprint: str,
        full: Hashes,
        narrow: Hashes | None,
        names: Sequence[str],
    ) -> Numbers:
        """The number of each row with these hashes, uint64[n]: known ones, and new ones for new
        rows. `narrow`: its hash over the columns that earlier tables had."""
        with writing(self._db):
            hashes, numbers = self._stored()
            found = _look_up(hashes, numbers, full)
            known = found >= 0
            if narrow is not None:
                older = _look_up(hashes, numbers, narrow)
                taken = np.isin(older, found[known])
                found = np.where(known | taken, found, older)
            new = found < 0
            count = int(numbers.max()) + 1 if len(numbers) else 0
            found[new] = np.arange(count, count + int(new.sum()))
            if not known.all():
                self._db.execute(
                    "INSERT INTO row_hashes (hashes, numbers) VALUES (?, ?)",
                    (full[~known].tobytes(), found[~known].tobytes()),
                )
            if names:
                self._db.execute(
                    "INSERT OR REPLACE INTO registry VALUES ('columns', ?)",
                    (json.dumps(list(names)).encode(),),
                )
            self._db.execute(
                "INSERT OR REPLACE INTO read_tables VALUES"
                " (?, (SELECT COALESCE(MAX(at), 0) + 1 FROM read_tables), ?)",
                (fingerprint, pack(found)),
            )
            self._db.execute(
                "DELETE FROM read_tables WHERE at <= (SELECT MAX(at) FROM read_tables) - ?",
                (_KEPT_TABLES,),
            )
        return found

    def _stored(self) -> tuple[Hashes, Numbers]:
        rows = self._db.execute("SELECT hashes, numbers FROM row_hashes ORDER BY id").fetchall()
        return (
            np.frombuffer(b"".join(hashes for hashes, _ in rows), np.uint64),
            np.frombuffer(b"".join(numbers for _, numbers in rows), np.int64),
        )

    def _get(self, name: str) -> bytes:
        row = self._db.execute("SELECT value FROM registry WHERE name = ?", (name,)).fetchone()
        return b"" if row is None else bytes(row[0])


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        of = path.stat()
    except OSError:
        return ()
    return of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns


def _tell_apart(hashes: Hashes) -> Hashes:
    """Different hashes for equal rows: the second of them gets another one, and so on."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    first = np.ones(len(hashes), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    places = np.arange(len(hashes))
    occurrence = np.empty(len(hashes), np.uint64)
    occurrence[order] = (places - np.maximum.accumulate(np.where(first, places, 0))).astype(
        np.uint64
    )
    with np.errstate(over="ignore"):
        return hashes ^ (occurrence * GOLDEN)


def _look_up(hashes: Hashes, numbers: Numbers, wanted: Hashes) -> Numbers:
    """The number for each hash, or -1."""
    found = np.full(len(wanted), -1, np.int64)
    if len(hashes) and len(wanted):
        order = np.argsort(hashes, kind="stable")
        places = np.searchsorted(hashes, wanted, sorter=order)
        places = order[np.minimum(places, len(order) - 1)]
        same = hashes[places] == wanted
        found[same] = numbers[places[same]]
    return found
