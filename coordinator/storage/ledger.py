"""The ledger: an append-only, hash-chained log, and the authority on what happened.

Each entry's hash covers the one before, so a changed or missing entry is detected. There is one
writer. When `append` returns, the entries survive a power cut. `sqlite_ledger` keeps them in a file
of the home, `postgres_ledger` in a database; `ledger_place` opens the one that a home uses.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from protocols.errors import HomeError

#: The format of the table, in each engine.
FORMAT = 1
#: The hash before the first entry.
START = bytes(32)


class Entry(NamedTuple):
    """`subject` is a run's id, `job/ID` or "fleet"; `body` is JSON; `at` is Unix s."""

    seq: int
    at: float
    subject: str
    body: bytes
    hash: bytes


class Ledger(Protocol):
    """Append and read entries. Thread-safe. Numbers begin with 1 and have no gaps."""

    #: True if an append may take seconds: the event loop leaves it to a thread.
    is_remote: bool

    @property
    def term(self) -> int:
        """Higher than that of every process that has led before this one; 0 for a file."""

    def append(self, subject: str, bodies: Sequence[bytes]) -> None:
        """Add entries, all or none. Raises DiskFull, HomeError, LedgerUnreachable.

        After DiskFull none was added. After LedgerUnreachable the caller calls again with the same
        arguments, or does not use the ledger any more: the entries may have been added.
        """

    def load(self, entries: Iterable[Entry]) -> int:
        """Fill an empty ledger with the entries of another one, all or none; how many there are.

        Raises HomeError if it is not empty, or an entry does not match the one before.
        """

    def check_answers(self) -> None:
        """Raise LedgerUnreachable if it does not answer now, which may take seconds."""

    def check_leads(self) -> None:
        """Raise LeadershipLost if another process has taken over the ledger, or may have."""

    def entries(
        self, subject: str | None = None, *, before: int = 0, after: int = 0
    ) -> Iterator[Entry]:
        """All entries, oldest first, or those of one subject between two numbers (0: no limit)."""

    def entries_after(self, seq: int, limit: int) -> list[Entry]:
        """At most `limit` entries with a higher number than `seq`, oldest first."""

    def entry(self, seq: int) -> Entry | None:
        """The entry of this number; None if there is none."""

    def subjects(self) -> list[str]:
        """All subjects, in order of their first entry."""

    def newest(self) -> Entry | None:
        """The last entry; None if the ledger is empty."""

    def verify(self) -> int | None:
        """The number of the first entry whose hash does not match; None if all match."""

    def close(self) -> None:
        """Close it. The ledger cannot be used any more."""


async def until_answers(ledger: Ledger) -> None:
    """Wait in a thread until a remote ledger answers, before the event loop appends to it.

    Raises LedgerUnreachable. A database that hangs would otherwise stop the event loop for seconds.
    """
    if ledger.is_remote:
        await asyncio.to_thread(ledger.check_answers)


async def append_beside(ledger: Ledger, subject: str, bodies: Sequence[bytes]) -> None:
    """`append`, to a remote ledger in a thread: if it hangs, the event loop continues.

    Nobody else may append to this subject until it returns. Raises DiskFull, LedgerUnreachable,
    LeadershipLost.
    """
    if ledger.is_remote:
        await asyncio.to_thread(ledger.append, subject, bodies)
    else:
        ledger.append(subject, bodies)


def chain(head: bytes, at: float, subject: str, body: bytes) -> bytes:
    """The hash of an entry after the one with the hash `head`."""
    sha = hashlib.sha256(head)
    sha.update(f"{at!r}\n{subject}\n".encode())
    sha.update(body)
    return sha.digest()


def checked(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of a whole ledger. Raises HomeError at one that does not match the one before."""
    last, head = 0, START
    for entry in entries:
        is_bytes = isinstance(entry.body, bytes)  # SQLite does not enforce column types
        head = chain(head, entry.at, entry.subject, entry.body) if is_bytes else b""
        if (entry.seq, entry.hash) != (last + 1, head):
            raise HomeError(f"entry {entry.seq} of the ledger does not match the one before")
        yield entry
        last = entry.seq


def first_mismatch(entries: Iterable[Entry]) -> int | None:
    """The number of the first entry, of all, whose hash does not match; None if all match."""
    sound = 0
    try:
        for entry in checked(entries):
            sound = entry.seq
    except HomeError:
        return sound + 1
    return None
