"""The record of what was disclosed: the sets of rows behind every answer that left this machine.

Survey, training, evaluation, inference and analytics share it. Two sets that differ in one row, or
in a few, would describe these rows by their difference. So a set is disclosed only if it differs
from every earlier one in no row, or in at least `min_rows`. The file is written, fully synchronous,
before the answer leaves; it has mode 0600 and never leaves the machine.

Rows are numbers of `row_registry`, so the rule holds when a table grows, shrinks or is sorted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data.private_database import open_database, writing
from protocols.errors import NotAllowed

#: Row numbers, int64[n].
Numbers = npt.NDArray[np.int64]
#: What a set was used for. Those of one admitted table are not compared with each other:
#: `table` (a survey), `train` and `held` (evaluation). `steps`: a part of an epoch. `cell`: rows of
#: one cell of an analytics answer.
Use = Literal["table", "train", "held", "steps", "cell"]
_OF_TABLE = frozenset({"table", "train", "held"})

#: The most sets that a requester can choose (`cell`, `steps`); afterwards no new set is disclosed.
MAX_SETS = {"cell": 512, "steps": 50_000}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS told_sets (
  id INTEGER PRIMARY KEY, at TEXT DEFAULT CURRENT_TIMESTAMP, use TEXT, size INTEGER, sketch BLOB,
  bits BLOB
);
"""
#: Buckets of a sketch. Each has the XOR of the mixed numbers of its rows.
_BUCKETS = 128
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Sketch = npt.NDArray[np.uint64]


class ToldSet(NamedTuple):
    """Rows that one answer discloses something about: sorted numbers, int64[n]."""

    use: Use
    rows: Numbers


class DisclosedSets:
    """One file, which several processes may use at a time; a connection is for one thread."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, _SCHEMA)
        self._read = 0  # the last id of those below
        self._uses: list[str] = []
        self._ids: list[int] = []
        self._sketches = np.zeros((0, _BUCKETS), np.uint64)

    def close(self) -> None:
        self._db.close()

    def tell(self, sets: Sequence[ToldSet], min_rows: int) -> None:
        """Check these sets against all earlier ones and each other, and record them.

        When it returns, they are on disk and the answer may leave. Raises NotAllowed, and then
        records nothing.
        """
        with writing(self._db):
            self._refresh()
            new: list[tuple[ToldSet, Sketch]] = []
            for told in sets:
                sketch = _sketch(told.rows)
                if not self._is_known(told, sketch, min_rows):
                    for other, other_sketch in new:
                        if (sketch != other_sketch).any():
                            _compare(told, other.use, other.rows, min_rows)
                    new.append((told, sketch))
            self._check_count([told.use for told, _ in new])
            self._insert(new)

    def rows_of(self, *uses: Use) -> list[Numbers]:
        """The sets that were disclosed for these uses, in their order."""
        marks = ", ".join("?" * len(uses))
        found = self._db.execute(
            f"SELECT bits FROM told_sets WHERE use IN ({marks}) ORDER BY id", uses
        )
        return [unpack(bits) for (bits,) in found]

    def _insert(self, new: Sequence[tuple[ToldSet, Sketch]]) -> None:
        self._db.executemany(
            "INSERT INTO told_sets (use, size, sketch, bits) VALUES (?, ?, ?, ?)",
            [(t.use, len(t.rows), s.tobytes(), pack(t.rows)) for t, s in new],
        )

    def _is_known(self, told: ToldSet, sketch: Sketch, min_rows: int) -> bool:
        """True if the same set was disclosed for this use. Raises NotAllowed if it must not be."""
        if not self._ids:
            return False
        # Rows that differ are in at least as many pieces as buckets differ, so most sets need no
        # closer look.
        differing = (self._sketches != sketch).sum(1)
        uses = np.array(self._uses)
        if ((differing == 0) & (uses == told.use)).any():
            return True
        close = (differing > 0) & (differing < min_rows)
        if told.use in _OF_TABLE:
            close |= (differing > 0) & (uses == told.use)
        for place in np.flatnonzero(close).tolist():
            (bits,) = self._db.execute(
                "SELECT bits FROM told_sets WHERE id = ?", (self._ids[place],)
            ).fetchone()
            _compare(told, self._uses[place], unpack(bits), min_rows)
        return False

    def _check_count(self, uses: Sequence[str]) -> None:
        for use, most in MAX_SETS.items():
            if use in uses and self._uses.count(use) + uses.count(use) > most:
                raise NotAllowed(
                    f"too many different sets of rows have been told: {most} ({use})",
                    "sets that were told before can be told again",
                )

    def _refresh(self) -> None:
        """Read the sets that were recorded since the last call, by any process."""
        rows = self._db.execute(
            "SELECT id, use, sketch FROM told_sets WHERE id > ? ORDER BY id", (self._read,)
        ).fetchall()
        if rows:
            self._ids += [number for number, _, _ in rows]
            self._uses += [use for _, use, _ in rows]
            added = np.frombuffer(b"".join(sketch for *_, sketch in rows), np.uint64)
            self._sketches = np.concatenate([self._sketches, added.reshape(-1, _BUCKETS)])
            self._read = self._ids[-1]


def _compare(told: ToldSet, other_use: str, other: Numbers, min_rows: int) -> None:
    """Raise NotAllowed if these sets differ in too few rows.

    Two states of one table must differ in enough rows that are gone, and in enough that are new:
    a third answer about the new rows alone would reveal those that are gone.
    """
    gone = len(np.setdiff1d(other, told.rows, assume_unique=True))
    added = len(np.setdiff1d(told.rows, other, assume_unique=True))
    if told.use == other_use and told.use in _OF_TABLE:
        counts = [gone, added]
    elif told.use in _OF_TABLE and other_use in _OF_TABLE:
        return
    else:
        counts = [gone + added]
    for count in counts:
        if 0 < count < min_rows:
            raise NotAllowed(
                # How many is not told: the operator reads this, and chose the sets.
                "together with an earlier answer this would reveal a few rows alone, and the "
                f"owner's data_min_count is {min_rows}",
                f"nothing of these rows leaves until {min_rows} differ: commonweight-agent doctor"
                if told.use in _OF_TABLE
                else f"ask for rows that differ by {min_rows} or more",
            )


def pack(rows: Numbers) -> bytes:
    """Row numbers, compressed; small if they are sorted."""
    return zlib.compress(np.diff(rows, prepend=0).astype(np.int64).tobytes(), 1)


def unpack(packed: bytes) -> Numbers:
    """The row numbers of `pack`."""
    return np.cumsum(np.frombuffer(zlib.decompress(packed), np.int64), dtype=np.int64)


def _sketch(rows: Numbers) -> Sketch:
    """uint64[buckets]: equal for equal sets; sets that differ in n buckets differ in n rows or
    more."""
    mixed = mix(rows.astype(np.uint64))
    order = np.argsort(mixed % np.uint64(_BUCKETS), kind="stable")
    ordered = mixed[order]
    counts = np.bincount((ordered % np.uint64(_BUCKETS)).astype(np.int64), minlength=_BUCKETS)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sketch = np.zeros(_BUCKETS, np.uint64)
    full = counts > 0
    sketch[full] = np.bitwise_xor.reduceat(ordered, starts[full])
    return sketch


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele et al., 2014): a bijection whose outputs look random."""
    with np.errstate(over="ignore"):
        z = (values + np.uint64(1)) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
