"""Which rows of the owner's data may be used: new rows come in groups, never alone.

All rows of the first table are admitted. Later rows wait until `data_min_count` have come, and are
then admitted together. A row that is deleted is gone at once. An edited row is a deleted one and a
new one. Each admitted row is trained on or held out for good, and a group of new rows is divided
only if both parts have enough rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data import helper_requests
from agent.data.disclosed_sets import Numbers, mix, pack, unpack
from agent.data.private_database import open_database, writing
from protocols.errors import DataError, NotAllowed

Mask = npt.NDArray[np.bool_]

#: The inverse of the share of rows that are held out.
HELD_OUT_OF = 5
_SCHEMA = """
CREATE TABLE IF NOT EXISTS admitted (id INTEGER PRIMARY KEY, numbers BLOB);
CREATE TABLE IF NOT EXISTS splits (id INTEGER PRIMARY KEY, name TEXT, train BLOB, held BLOB);
CREATE TABLE IF NOT EXISTS table_sizes (size INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS last_table (id INTEGER PRIMARY KEY, counts TEXT);
"""


class Counts(NamedTuple):
    """Rows of the table that was read last: those that may be used, and those that wait."""

    admitted: int
    waiting: int
    min_rows: int

    def __str__(self) -> str:
        used = f"{self.admitted} rows may be used"
        if not self.waiting:
            return used
        return f"{used}; {self.waiting} new rows wait until {self.min_rows} have come"


class Split(NamedTuple):
    """Masks over the rows of a table: to train on, and held out. A row may be in neither."""

    train: Mask
    held_out: Mask


class Admission:
    """The groups of rows that were admitted, in the file of `table_memory`."""

    def __init__(self, path: Path) -> None:
        self._store = helper_requests.stores() or AdmissionStore(path)

    def close(self) -> None:
        self._store.close()

    def admit(self, numbers: Numbers, min_rows: int, *, whole: bool = False) -> Mask:
        """Which rows may be used. Admits a group of new rows if there are enough.

        `whole`: these are all rows of the owner's table. Raises NotAllowed if nearly all of them
        changed, and their number by a few: the same people may be in it, and a few others.
        """
        return self._store.admit(numbers, min_rows, whole)

    def split(
        self,
        name: str,
        numbers: Numbers,
        usable: Mask,
        min_rows: int,
        draw: Callable[[Mask, int], Mask],
    ) -> Split:
        """The parts of these admitted rows, of which a task can use some (`usable`).

        `draw(new, group)` divides a group of new rows, a mask over all: it returns a mask over
        these, True is held out. `name` tells divisions of the same rows apart. Raises NotAllowed if
        a task can use only a few rows of a part.
        """
        new, group = self._store.find_new(name, numbers, usable)
        drawn = draw(new, group) if new.any() else np.zeros(0, bool)
        train, held = self._store.divide(name, numbers, usable, min_rows, drawn)
        used = [_part(part, numbers, usable, min_rows) for part in (train, held)]
        for part, of in zip(used, (train, held), strict=True):
            if part.sum() < min(min_rows, of.sum()):
                raise NotAllowed(
                    "the run can use only a few rows to train on or to hold out, and the owner's "
                    f"data_min_count is {min_rows}"
                )
        return Split(*used)


class AdmissionStore:
    """The file of the admitted rows."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, _SCHEMA)

    def close(self) -> None:
        self._db.close()

    def admit(self, numbers: Numbers, min_rows: int, whole: bool) -> Mask:
        """As `Admission.admit`."""
        with writing(self._db):
            groups = [unpack(rows) for (rows,) in self._db.execute("SELECT numbers FROM admitted")]
            admitted = np.isin(numbers, _join(groups))
            waiting = int((~admitted).sum())
            if whole:
                self._check_size(len(numbers), min_rows, rewritten=2 * waiting > len(numbers))
            if waiting >= min_rows:
                self._db.execute(
                    "INSERT INTO admitted (numbers) VALUES (?)",
                    (pack(np.sort(numbers[~admitted])),),
                )
                admitted, waiting = np.ones(len(numbers), bool), 0
            counts = Counts(int(admitted.sum()), waiting, min_rows)
            self._db.execute(
                "INSERT OR REPLACE INTO last_table VALUES (1, ?)", (json.dumps(counts),)
            )
        return admitted

    def _check_size(self, size: int, min_rows: int, *, rewritten: bool) -> None:
        sizes = {size for (size,) in self._db.execute("SELECT size FROM table_sizes")}
        close = [abs(size - other) for other in sizes if 0 < abs(size - other) < min_rows]
        if rewritten and close:
            raise NotAllowed(
                "nearly all rows of the table changed, and their number by a few: the owner's "
                f"data_min_count is {min_rows}",
                "leave columns that change at each export out of the file",
            )
        self._db.execute("INSERT OR IGNORE INTO table_sizes VALUES (?)", (size,))

    def counts(self) -> Counts | None:
        """Of the table that was read last; None before the first."""
        row = self._db.execute("SELECT counts FROM last_table").fetchone()
        return None if row is None else Counts(*json.loads(row[0]))

    def find_new(self, name: str, numbers: Numbers, usable: Mask) -> tuple[Mask, int]:
        """The usable rows that are in no part yet, and how many groups were divided before."""
        train, held, groups = self._parts(name)
        return usable & ~np.isin(numbers, train) & ~np.isin(numbers, held), groups

    def divide(
        self, name: str, numbers: Numbers, usable: Mask, min_rows: int, drawn: Mask
    ) -> tuple[Mask, Mask]:
        """Masks of the rows to train on and of those held out. Divides new rows, if there are
        enough, as `drawn` for those of `find_new` says. Raises DataError if these changed."""
        with writing(self._db):
            train, held, _ = self._parts(name)
            new, groups = self.find_new(name, numbers, usable)
            count = int(new.sum())
            if count and (not groups or count >= min_rows):
                if len(drawn) != count:
                    raise DataError("the table changed while it was divided", "try again")
                out = np.zeros(len(numbers), bool)
                if not groups or count // HELD_OUT_OF >= min_rows:
                    out[new] = drawn
                elif (len(held) + count) * HELD_OUT_OF <= len(train) + len(held) + count:
                    out = new
                added = np.sort(numbers[new & ~out]), np.sort(numbers[out])
                self._db.execute(
                    "INSERT INTO splits (name, train, held) VALUES (?, ?, ?)",
                    (name, *map(pack, added)),
                )
                train, held = _join([train, added[0]]), _join([held, added[1]])
        return np.isin(numbers, train), np.isin(numbers, held)

    def _parts(self, name: str) -> tuple[Numbers, Numbers, int]:
        """The rows to train on, those held out, and the number of groups that were divided."""
        rows = self._db.execute(
            "SELECT train, held FROM splits WHERE name = ? ORDER BY id", (name,)
        ).fetchall()
        train, held = (_join([unpack(row[place]) for row in rows]) for place in (0, 1))
        return train, held, len(rows)


def split_classes(classes: Numbers, min_rows: int, divide: Callable[[Mask], Split]) -> Split:
    """What `divide` makes of the rows with a class, without classes of few rows to train on.

    The weights of a class change by the sum of its rows less what all rows add, so a class with one
    row would reveal that row.
    """
    usable = classes >= 0
    while True:
        split = divide(usable)
        counts = np.bincount(classes[split.train], minlength=int(classes.max(initial=0)) + 1)
        rare = (counts < min_rows)[classes] & usable
        if not rare.any():
            return split
        usable = usable & ~rare


def _part(part: Mask, numbers: Numbers, usable: Mask, min_rows: int) -> Mask:
    """The usable rows of a part. If only a few rows are not usable, some more are left out.

    A target may be missing in a few rows. A run for it and one for another target would then
    differ in these rows. Which more rows are left out depends on which are not usable.
    """
    used = part & usable
    unused = numbers[part & ~usable]
    if not 0 < len(unused) < min_rows:
        return used
    salt = np.bitwise_xor.reduce(mix(unused.astype(np.uint64)))
    order = np.argsort(mix(numbers[used].astype(np.uint64) ^ salt), kind="stable")
    used[np.flatnonzero(used)[order[: min_rows - len(unused)]]] = False
    return used


def _join(parts: list[Numbers]) -> Numbers:
    return np.concatenate([np.zeros(0, np.int64), *parts])
