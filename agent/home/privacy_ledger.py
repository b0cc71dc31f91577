"""The owner's ledger of privacy: every event in which something about the rows left this machine.

SQLite in the folder `told`, mode 0600, fully synchronous: an event is charged before its answer
leaves, so no kill or restart loses one. An answer that was charged and never left stays charged.
The ledger stores events, not ε; `protocols.privacy.accountant` says what they cost together.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from agent.data.private_database import open_database, writing
from agent.home import settings
from agent.home.settings_schema import AgentSettings
from protocols.errors import HomeError, NotAllowed
from protocols.privacy import accountant, events
from protocols.privacy.events import Event, Exact

#: What an event was for: a run's training, its evaluation or its survey before round 1, a question
#: (`analyze`), an inference job, or what the owner has added by hand.
Purpose = Literal["training", "evaluation", "survey", "question", "job", "added"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
  id INTEGER PRIMARY KEY, at REAL, purpose TEXT, name TEXT, asked_by TEXT, about TEXT,
  events TEXT, epsilon REAL, key TEXT UNIQUE
);
CREATE TABLE IF NOT EXISTS heads (id INTEGER PRIMARY KEY, told INTEGER, lost INTEGER);
"""
_COLUMNS = "at, purpose, name, asked_by, about, events, epsilon"
_DAY_S = 86_400.0
#: How keys of charges for scores of models begin.
_SCORES = "scores"
#: Rounding of a noise that was chosen for exactly the limit.
_SLACK = 1e-6


class Charge(NamedTuple):
    """One entry. `name` is the run or job, `asked_by` the fleet, `about` a text for the owner.

    `epsilon`: of a question, as it was asked. `at`: Unix s.
    """

    purpose: Purpose
    name: str
    events: tuple[Event, ...]
    asked_by: str = ""
    about: str = ""
    epsilon: float = 0.0
    at: float = 0.0

    @property
    def is_exact(self) -> bool:
        """True if something left without noise, so that no ε bounds it."""
        return any(isinstance(event, Exact) for event in self.events)

    @property
    def noisy(self) -> tuple[Event, ...]:
        """Its events that have noise."""
        return tuple(event for event in self.events if not isinstance(event, Exact))


class Limit(NamedTuple):
    """The owner's limit: all noisy answers together cost at most `epsilon` at `delta`. 0: none."""

    epsilon: float
    delta: float

    @classmethod
    def of(cls, chosen: AgentSettings) -> Limit:
        return cls(chosen.privacy_max_epsilon, chosen.privacy_delta)


class PrivacyLedger:
    """The ledger in the file `path`. Several processes may use it; each object one thread.

    Raises HomeError if it cannot be read, or if the home has answers that it does not count;
    DiskFull.
    """

    def __init__(self, path: Path) -> None:
        if (old := path.parent.parent / "analysis.db").exists():
            raise HomeError(
                f"{old} has answers of a version before 0.1, which this version does not count",
                "move the file to another folder to continue; its answers then count no more",
            )
        self._db = open_database(path, _SCHEMA)

    def close(self) -> None:
        self._db.close()

    def charge(self, charge: Charge, limit: Limit, key: str | None = None) -> None:
        """Record what is about to leave. Raises NotAllowed, and records nothing, if all events
        together would cost more than the owner's limit.

        `key`: names the answer. One that was charged before may leave again without a charge.
        """
        is_charged = self.has(key)
        if not is_charged:
            self.check_complete()
        while not is_charged:
            last = self._last_id()
            if limit.epsilon:  # takes seconds for many kinds of events; others may write
                check(_noisy(self.charges()), charge.events, limit)
            with writing(self._db):
                is_charged = not limit.epsilon or self._last_id() == last
                if is_charged:
                    _insert(self._db, charge, key)

    # --- a home that was restored from a backup ---

    def head(self) -> int:
        """How many entries the ledger has had, with those whose loss the owner has confirmed."""
        return self._last_id() + self._heads()[1]

    def learn(self, told: int) -> str:
        """Note the number of entries that this machine has stated. Returns a text for the owner if
        some are missing, else an empty text."""
        with writing(self._db):
            self._db.execute(
                "INSERT INTO heads VALUES (1, ?, 0) "
                "ON CONFLICT (id) DO UPDATE SET told = MAX(told, excluded.told)",
                (told,),
            )
        return self._loss()

    def check_complete(self) -> None:
        """Raise NotAllowed if entries are missing and the owner has not confirmed that."""
        if loss := self._loss():
            raise NotAllowed(
                loss,
                "on that machine, charge what is missing (commonweight-agent budget --add), then "
                "confirm: commonweight-agent budget --restored",
            )

    def num_missing(self) -> int:
        """How many entries this machine has stated that the ledger lacks."""
        return max(0, self._heads()[0] - self.head())

    def confirm_loss(self) -> int:
        """Record that the owner accepts the missing entries. Returns how many."""
        with writing(self._db):
            missing = self.num_missing()
            self._db.execute("UPDATE heads SET lost = lost + ?", (missing,))
        return missing

    def _loss(self) -> str:
        if not (missing := self.num_missing()):
            return ""
        return (
            f"the owner's ledger of privacy lacks {missing} of its {self._heads()[0]} entries, as "
            "after a restore from a backup, so answers with noise stay on this machine"
        )

    def _heads(self) -> tuple[int, int]:
        """The entries that this machine has stated, and those whose loss is confirmed."""
        told, lost = self._db.execute("SELECT told, lost FROM heads").fetchone() or (0, 0)
        return int(told), int(lost)

    def has(self, key: str | None) -> bool:
        """True if the answer with this key was charged; False without a key."""
        return bool(self._db.execute("SELECT 1 FROM charges WHERE key = ?", (key,)).fetchone())

    def charge_exact(self, charge: Charge) -> None:
        """Record that something of this purpose and name left without noise, once for both."""
        with writing(self._db):
            _insert(self._db, charge, f"exact {charge.purpose} {charge.name}")

    def charge_scores(self, charge: Charge, key: str) -> None:
        """Record that scores of models leave: once for this request, the digest `key`."""
        with writing(self._db):
            _insert(self._db, charge, f"{_SCORES} {key}")

    def scores_of_day(self, key: str) -> int:
        """How many requests for scores were answered in the last 24 hours, without this one."""
        (count,) = self._db.execute(
            "SELECT COUNT(*) FROM charges WHERE at > ? AND key GLOB ? AND key != ?",
            (time.time() - _DAY_S, f"{_SCORES} *", f"{_SCORES} {key}"),
        ).fetchone()
        return int(count)

    def _last_id(self) -> int:
        """The number of the last entry: entries are only added. 0 without any."""
        (last,) = self._db.execute("SELECT COALESCE(MAX(id), 0) FROM charges").fetchone()
        return int(last)

    def charges(self) -> list[Charge]:
        """All entries, oldest first."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM charges ORDER BY id").fetchall()
        return [
            Charge(purpose, name, events.decode(told), asked_by, about, epsilon, at)
            for at, purpose, name, asked_by, about, told, epsilon in rows
        ]

    def events_of(self, purpose: Purpose, name: str) -> list[Event]:
        """The events of one purpose and run or job."""
        rows = self._db.execute(
            "SELECT events FROM charges WHERE purpose = ? AND name = ?", (purpose, name)
        )
        return [event for (told,) in rows for event in events.decode(told)]

    def asked_epsilon(self) -> float:
        """The sum of ε of all questions: what `analyze_epsilon` limits."""
        (total,) = self._db.execute(
            "SELECT COALESCE(SUM(epsilon), 0) FROM charges WHERE purpose = 'question'"
        ).fetchone()
        return float(total)


def ledger_file(home: Path) -> Path:
    """The ledger of a home, in the folder of what was told."""
    return settings.memory_file(home).with_name("privacy.db")


def check(spent: Iterable[Event], more: Sequence[Event], limit: Limit) -> None:
    """Raise NotAllowed if `more` would exceed the owner's limit after `spent`."""
    before = list(spent)
    if total := accountant.epsilon_above(limit.epsilon + _SLACK, [*before, *more], limit.delta):
        now = accountant.epsilon_of(before, limit.delta)
        raise NotAllowed(
            f"the owner's privacy_max_epsilon is {limit.epsilon:g} (at δ = {limit.delta:g}); "
            f"{now:.3g} is spent, and with this it would be {total:.3g}",
            "ask with more noise; the owner sees what was spent: commonweight-agent budget",
        )


def spent_epsilon(charges: Iterable[Charge], delta: float) -> float:
    """The ε of all noisy events together; exact ones have none."""
    return accountant.epsilon_of(_noisy(charges), delta)


def left_epsilon(charges: Sequence[Charge], limit: Limit) -> float:
    """The ε of one more run, with Gaussian noise and the limit's δ, that the limit still allows."""
    spent, low, high = list(_noisy(charges)), 0.0, limit.epsilon
    while high - low > 1e-3 * limit.epsilon:
        middle = (low + high) / 2
        run = events.Gaussian(accountant.noise_for(middle, limit.delta, 1.0, 1))
        if accountant.epsilon_above(limit.epsilon, [*spent, run], limit.delta):
            high = middle
        else:
            low = middle
    return low


def _noisy(charges: Iterable[Charge]) -> Iterable[Event]:
    for charge in charges:
        yield from charge.noisy


def _insert(db: sqlite3.Connection, charge: Charge, key: str | None = None) -> None:
    told = events.encode(charge.events).decode()
    values = charge.at or time.time(), charge.purpose, charge.name, charge.asked_by, charge.about
    db.execute(
        f"INSERT OR IGNORE INTO charges ({_COLUMNS}, key) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*values, told, charge.epsilon, key),
    )
