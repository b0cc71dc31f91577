"""This agent's part of the coordinator's log of versions, in one SQLite file of its home.

It holds the last entries with their hashes, the heads that were signed over them, and what other
peers have seen. Used by several threads; the caller holds a lock.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from agent.home.log_file import Appended, Known, LogFile
from protocols.messages.version_log import LogEntry, LogHead

#: Entries and heads that are kept. Heads for the audit are kept once an hour.
MAX_ENTRIES, MAX_AUDIT_HEADS = 4096, 10_000
_PRUNE_EVERY, _AUDIT_EVERY_S = 64, 3600.0


class Confirmed(NamedTuple):
    """The newest head of a peer, of this epoch, that agrees with what this agent has seen."""

    peer: str
    size: int
    at: float


class LogStore(LogFile):
    """The entries, heads and epochs of one fleet. Raises as `LogFile`."""

    # --- the log ---

    def newest(self) -> Known | None:
        """The last accepted head."""
        if self._cache.newest is None:
            self._cache.newest = (self.head_until(sys.maxsize),)
        return self._cache.newest[0]

    def first_size(self) -> int:
        """How many entries precede the first that is known here."""
        row = self._execute("SELECT MIN(size) FROM entries").fetchone()
        return int(row[0] or 0)

    def head_until(self, size: int) -> Known | None:
        """The last accepted head with at most `size` entries."""
        # CROSS JOIN keeps SQLite from the other order, which reads and sorts all heads.
        row = self._execute(
            "SELECT e.size, e.hash, h.head FROM heads h CROSS JOIN entries e ON e.size = h.size "
            "WHERE h.size <= ? ORDER BY h.size DESC, h.ledger DESC LIMIT 1",
            (size,),
        ).fetchone()
        return Known(*row) if row else None

    def head_of_ledger(self, ledger: int) -> bytes:
        """The accepted head over this many entries of the ledger, or empty."""
        row = self._execute("SELECT head FROM heads WHERE ledger = ?", (ledger,)).fetchone()
        return bytes(row[0]) if row else b""

    def hash_at(self, size: int) -> bytes | None:
        """The hash of the log's first `size` entries; None if it is not known here."""
        if (end := self._cache.appended) is not None and end.size == size:
            return end.hash
        row = self._execute("SELECT hash FROM entries WHERE size = ?", (size,)).fetchone()
        return bytes(row[0]) if row else None

    def entries(self, after: int, until: int) -> list[bytes]:
        """The entries `after` + 1 to `until`, as they are encoded."""
        rows = self._execute(
            "SELECT entry FROM entries WHERE size > ? AND size <= ? ORDER BY size", (after, until)
        )
        return [bytes(entry) for (entry,) in rows]

    def last_versions(self, runs: set[str]) -> dict[str, tuple[int, str]]:
        """By run: number and digest of its last version; -1 if it has none. Unknown runs are left
        out."""
        found = {}
        for run in runs:
            if (entry := self._last_entry(run, sys.maxsize)) is not None:
                found[run] = (-1, "") if entry.kind == "run" else (entry.number, entry.digest)
                continue
            row = self._execute(
                "SELECT kind, number, digest FROM entries WHERE run = ? ORDER BY size DESC LIMIT 1",
                (run,),
            ).fetchone()
            if row:
                found[run] = (-1, "") if row[0] == "run" else (int(row[1]), str(row[2]))
        return found

    def _last_entry(self, run: str, until: int) -> LogEntry | None:
        """The last entry of a run, if it is in memory and among the first `until`."""
        if (end := self._cache.appended) is None or end.of_run is None:
            return None
        size, entry = end.of_run
        return entry if entry.run == run and size <= until else None

    def last_entry_of(self, run: str, number: int) -> int:
        """The place of the entry of this run that version `number` repeats; 0 if unknown."""
        row = self._execute(
            "SELECT MAX(size) FROM entries WHERE run = ? AND (number >= ? OR kind = 'run')",
            (run, number),
        ).fetchone()
        return int(row[0] or 0)

    def has_version(self, run: str, number: int, digest: str, until: int) -> bool:
        """Whether the first `until` entries have this version, and none takes it back."""
        last = self._last_entry(run, until)
        is_version = last is not None and last.kind in ("version", "back")
        if last and is_version and (last.number, last.digest) == (number, digest):
            return True
        row = self._execute(
            "SELECT size, digest FROM entries WHERE run = ? AND number = ? AND size <= ? "
            "AND kind IN ('version', 'back') ORDER BY size DESC LIMIT 1",
            (run, number, until),
        ).fetchone()
        if not row or row[1] != digest:
            return False
        taken_back = self._execute(
            "SELECT 1 FROM entries WHERE run = ? AND kind = 'back' AND number < ? AND size > ? "
            "AND size <= ?",
            (run, number, row[0], until),
        ).fetchone()
        return taken_back is None

    def start(self, size: int, hash_: bytes) -> None:
        """Begin with a log of `size` entries that are not known here."""
        self._write(
            "INSERT OR REPLACE INTO entries (size, hash, got) VALUES (?, ?, ?)",
            (size, hash_, time.time()),
        )
        self._cache.newest = self._cache.appended = None

    def append(
        self,
        start: int,
        entries: Sequence[tuple[bytes, LogEntry]],
        hashes: Sequence[bytes],
        *,
        at_end: bool = True,
    ) -> None:
        """Add the entries that follow the first `start`, with the hash after each.

        Not `at_end`: later entries are known.
        """
        now = time.time()
        rows = [
            (size, data, hash_, now, entry.kind, entry.run, entry.number, entry.digest)
            for size, ((data, entry), hash_) in enumerate(
                zip(entries, hashes, strict=True), start + 1
            )
        ]
        if not rows:
            return
        of_run = self._cache.appended.of_run if self._cache.appended is not None else None
        self._write("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *rows)
        self._cache.newest = self._cache.appended = None
        end = start + len(rows)
        if end // _PRUNE_EVERY != start // _PRUNE_EVERY:
            self._write("DELETE FROM entries WHERE size <= ?", (end - MAX_ENTRIES,))
            self._write("DELETE FROM heads WHERE size <= ?", (end - MAX_ENTRIES,))
        elif at_end:
            with_run = [
                (row[0], entry) for row, (_, entry) in zip(rows, entries, strict=True) if entry.run
            ]
            self._cache.appended = Appended(end, hashes[-1], with_run[-1] if with_run else of_run)

    def add_head(self, head: LogHead, signed: bytes) -> None:
        """Remember an accepted head. One of each size is enough, beside the newest."""
        newest = self.newest()
        self._cache.newest = None
        if newest is not None and head.size <= newest.size:
            self._write("DELETE FROM heads WHERE size = ?", (head.size,))
        self._write(
            "INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (head.ledger, head.size, signed)
        )
        if newest is None or head.size >= newest.size:
            self._cache.newest = (Known(head.size, head.hash, signed),)
        if self._cache.audited_at is None:
            (last,) = self._execute("SELECT MAX(at) FROM audit").fetchone()
            self._cache.audited_at = -math.inf if last is None else float(last)
        if head.at > self._cache.audited_at + _AUDIT_EVERY_S:
            self._write("INSERT OR REPLACE INTO audit VALUES (?, ?)", (head.at, signed))
            self._cache.audited_at = head.at
            self._write(
                "DELETE FROM audit WHERE at <= (SELECT at FROM audit ORDER BY at DESC "
                "LIMIT 1 OFFSET ?)",
                (MAX_AUDIT_HEADS,),
            )

    def audit_heads(self) -> list[bytes]:
        """Signed heads that this agent has seen, one an hour and the newest, oldest first."""
        rows = [bytes(head) for (head,) in self._execute("SELECT head FROM audit ORDER BY at")]
        newest = self.newest()
        return [*rows, newest.head] if newest and newest.head not in rows else rows

    def cut(self, size: int) -> list[LogEntry]:
        """Forget all after the first `size` entries; return these entries."""
        rows = self._execute(
            "SELECT kind, got, run, number, digest FROM entries WHERE size > ? ORDER BY size",
            (size,),
        ).fetchall()
        self._write("DELETE FROM entries WHERE size > ?", (size,))
        self._write("DELETE FROM heads WHERE size > ?", (size,))
        self._write("DELETE FROM confirmed")
        self._cache.newest = self._cache.appended = None
        return [LogEntry(*row) for row in rows if row[0]]

    # --- epochs ---

    def note_epoch(self, head: LogHead, signed: bytes) -> None:
        """Remember the earliest head of its epoch, shown to this agent or to another peer."""
        noted = self._cache.noted
        if noted and noted.epoch == head.epoch and noted.at <= head.at:
            return
        self._write(
            "INSERT INTO epochs VALUES (?, ?, ?) ON CONFLICT (epoch) DO UPDATE SET "
            "at = excluded.at, head = excluded.head WHERE excluded.at < at",
            (head.epoch, head.at, signed),
        )
        self._cache.noted, self._cache.last_epoch = head, None

    def newer_epoch(self, epoch: int, before: float) -> bytes:
        """A head of a newer epoch that was signed `before` a time (Unix s), or empty."""
        if self._cache.last_epoch is None:
            (last,) = self._execute("SELECT MAX(epoch) FROM epochs").fetchone()
            self._cache.last_epoch = -1 if last is None else int(last)
        if epoch >= self._cache.last_epoch:
            return b""
        row = self._execute(
            "SELECT head FROM epochs WHERE epoch > ? AND at < ? ORDER BY at LIMIT 1",
            (epoch, before),
        ).fetchone()
        return bytes(row[0]) if row else b""

    # --- other peers ---

    def confirm(self, peer: str, size: int, at: float) -> None:
        """A peer's head of `size` entries, signed by it `at` a time, agrees with ours."""
        self._write(
            "INSERT INTO confirmed VALUES (?, ?, ?) ON CONFLICT (peer) DO UPDATE SET "
            "size = excluded.size, at = excluded.at WHERE excluded.size >= size",
            (peer, size, at),
        )

    def confirmed(self) -> list[Confirmed]:
        return [Confirmed(*row) for row in self._execute("SELECT * FROM confirmed")]

    def size_before(self, at: float) -> int:
        """How many entries were known `at` a time (Unix s)."""
        row = self._execute("SELECT MAX(size) FROM entries WHERE got <= ?", (at,)).fetchone()
        return int(row[0] or 0)
