"""Adversarial schedules of coordinators over one ledger, with lost and late statements.

The code of `PostgresLedger` and `Lease` runs over a simulated database that executes each statement
at once, late, or without an answer; the real one is in test_postgres_ledger.py. SCHEDULES=100000
python -m pytest tests/extras/cluster/test_two_leaders.py tries more.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from coordinator.storage import postgres_lease, postgres_ledger, postgres_session
from coordinator.storage.ledger import Entry, first_mismatch
from coordinator.storage.postgres_lease import VALID_S
from coordinator.storage.postgres_ledger import PostgresLedger
from protocols.errors import CommonweightError, LedgerUnreachable

SCHEDULES = int(os.environ.get("SCHEDULES", "3000"))
STEPS = 40
_FATES = ("done", "lost", "unanswered", "late")


class Database:
    """The two tables, a clock, and statements of lost connections that will still be executed."""

    def __init__(self, rng: random.Random, *, fenced: bool) -> None:
        self.rng, self.fenced = rng, fenced
        self.holder, self.epoch, self.expires, self.now = "", 0, -1.0, 0.0
        self.log: list[Entry] = []
        self.late: list[Callable[[], Any]] = []
        self.is_calm = False
        #: How many entries there were when the first coordinator began to lead, the second, …
        self.began: list[int] = []

    def execute(self, query: str, given: Any) -> tuple[list[Any], int]:
        """The rows of a statement, and how many rows it has changed."""
        if query == postgres_lease._TAKE:
            if self.expires > self.now:
                return [], 0
            self.holder, self.epoch, self.expires = given[0], self.epoch + 1, self.now + VALID_S
            self.began.append(len(self.log))
            return [(self.epoch,)], 1
        if query in (postgres_lease._RETAKE, postgres_lease._RENEW):
            if self.holder != given[0]:
                return [], 0
            self.expires = self.now + VALID_S
            self.epoch += query == postgres_lease._RETAKE
            return [(self.epoch,)], 1
        if query == postgres_ledger._NEWEST:
            return self.log[-1:], 0
        assert query == postgres_ledger._INSERT
        epoch, at, subject, seqs, bodies, hashes = given
        if epoch != self.epoch and self.fenced:
            return [], 0
        if seqs[0] <= len(self.log):
            raise psycopg.errors.UniqueViolation
        self.log += map(Entry, seqs, [at] * len(seqs), [subject] * len(seqs), bodies, hashes)
        return [], len(seqs)


class Connection:
    def __init__(self, db: Database) -> None:
        self._db, self._rows, self.rowcount = db, list[Any](), 0

    def execute(self, query: str, given: Any = (), binary: bool = False) -> Connection:
        db = self._db
        fate = "done" if db.is_calm else db.rng.choices(_FATES, (8, 1, 1, 1))[0]
        if fate == "late" and query != postgres_ledger._NEWEST:
            db.late.append(lambda: db.execute(query, given))
        if fate in ("done", "unanswered"):
            self._rows, self.rowcount = db.execute(query, given)
        if fate != "done":
            raise psycopg.OperationalError("the connection is lost")
        return self

    def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None

    def close(self) -> None:
        """The server may still execute what it got."""


class Coordinator:
    """Appends numbered groups, repeats them as a run does, and ends when another one leads."""

    def __init__(self, db: Database, name: str) -> None:
        self.ledger = PostgresLedger("simulated", name)
        self._name, self._number, self.waits, self.ended = name, 0, False, False
        self.acknowledged: list[bytes] = []

    def append(self) -> None:
        self._number += not self.waits
        bodies = [f"{self._name} {self._number} {part}".encode() for part in "ab"]
        try:
            self.ledger.append("run", bodies)
            self.acknowledged += bodies
            self.waits = False
        except LedgerUnreachable:
            self.waits = True
        except CommonweightError:
            self.ended = True


def play(seed: int, *, fenced: bool = True) -> None:
    """One schedule. Raises AssertionError if an entry is lost or doubled, or two lead."""
    db = Database(random.Random(seed), fenced=fenced)
    made: list[Coordinator] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postgres_ledger.log, "disabled", True)
        patch.setattr(postgres_session, "connect", lambda address: Connection(db))
        patch.setattr(postgres_session, "prepare", lambda *_: None)
        patch.setattr(postgres_ledger, "LeaseKeeper", lambda *_: None)
        patch.setattr(postgres_session, "answered_within", lambda *_: nullcontext())
        patch.setattr(PostgresLedger, "verify", lambda self: first_mismatch(db.log))
        for _ in range(STEPS):
            alive = [one for one in made if not one.ended]
            what = db.rng.choices(("append", "renew", "late", "time", "start"), (8, 3, 3, 3, 3))[0]
            if what == "append" and alive:
                db.rng.choice(alive).append()
            elif what == "renew" and alive:
                lease = db.rng.choice(alive).ledger._lease
                try:
                    lease.renew(Connection(db))  # type: ignore[arg-type]
                except (psycopg.Error, CommonweightError):
                    pass
            elif what == "late" and db.late:
                try:
                    db.late.pop(db.rng.randrange(len(db.late)))()
                except psycopg.Error:
                    pass
            elif what == "time":
                db.now += db.rng.choice((1.0, 7.0))
            elif what == "start" and db.expires <= db.now and len(made) < 4:
                db.is_calm = True
                made.append(Coordinator(db, f"c{len(made)}"))
                db.is_calm = False
    for late in db.late:
        try:
            late()
        except psycopg.Error:
            pass
    assert first_mismatch(db.log) is None
    found = Counter(entry.body for entry in db.log)
    assert not found or max(found.values()) == 1, "an entry was added twice"
    for one in made:
        assert all(found[body] == 1 for body in one.acknowledged), "an acknowledged entry is lost"
    for place, entry in enumerate(db.log):
        writer = int(entry.body[1:].split()[0])
        overtaken_at = min(db.began[writer + 1 :], default=len(db.log))
        assert place < overtaken_at, "one was overtaken and wrote all the same"


def test_no_schedule_loses_or_doubles_an_entry_or_lets_two_lead() -> None:
    for seed in range(SCHEDULES):
        play(seed)


def fails(seed: int) -> bool:
    try:
        play(seed, fenced=False)
    except AssertionError:
        return True
    return False


def test_the_schedules_find_an_append_that_does_not_check_the_epoch() -> None:
    """Control: without the check, a coordinator that was overtaken writes all the same."""
    assert any(map(fails, range(3000)))
