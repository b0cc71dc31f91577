"""The scores of models on this machine's rows that have left it, so that each is always the same.

A metric over all held-out rows is exact, and a model can be made so that one row decides it. So a
job (`infer --private`) repeats what the evaluations of runs have disclosed, and discloses little
else (`inference_jobs`). SQLite in the folder `told`, mode 0600; a score is recorded before it
leaves.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import random
import sqlite3
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from agent.data.private_database import mapped_errors, open_database
from agent.tasks import Setting
from agent.tasks.work import Done
from protocols.errors import Refused
from protocols.messages.envelope import Metrics
from protocols.messages.jobs import Score
from protocols.model import personalization
from protocols.privacy.events import DiscreteLaplace, Event

# An evaluation of a run waits for this commit. With a write-ahead log it is one write to the disk.
_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS told_scores (
  key TEXT PRIMARY KEY, at REAL, origin TEXT, num_examples INTEGER, metrics TEXT
);
CREATE TABLE IF NOT EXISTS noise (id INTEGER PRIMARY KEY CHECK (id = 1), secret BLOB);
INSERT OR IGNORE INTO noise VALUES (1, randomblob(32));
"""
_DAY_S = 86_400.0
#: Settings that change no evaluation.
_ORDER = frozenset({"seed", "round"})

Origin = Literal["run", "job"]


class ToldScores:
    """The scores in the file `path`, by model, task and settings. Thread-safe; it stays open."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _db(self) -> sqlite3.Connection:
        return open_database(self._path, _SCHEMA)

    def find(self, key: str) -> Score | None:
        """What was told of this model."""
        row = self._db.execute(
            "SELECT num_examples, metrics FROM told_scores WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Score(row[0], msgspec.json.decode(row[1], type=Metrics))

    def remember(self, key: str, origin: Origin, score: Score) -> None:
        """Record a score before it leaves. The score of a run replaces that of a job.

        Raises DiskFull, HomeError.
        """
        values = key, time.time(), origin, score.num_examples, msgspec.json.encode(score.metrics)
        with mapped_errors():
            self._db.execute("INSERT OR REPLACE INTO told_scores VALUES (?, ?, ?, ?, ?)", values)

    def chance(self, task: str, digest: str, count: int, right: int) -> random.Random:
        """The noise for a result of a model: equal results get equal noise.

        The noise is derived from a secret in this file. If another job, or a setting without
        effect, led to a new draw, the mean of many draws would have little noise.
        """
        (secret,) = self._db.execute("SELECT secret FROM noise").fetchone()
        about = msgspec.json.encode([task, digest, count, right])
        return random.Random(hmac.digest(secret, about, "sha512"))

    def count_of_day(self) -> int:
        """How many scores jobs got in the last 24 hours, without repetitions."""
        (count,) = self._db.execute(
            "SELECT COUNT(*) FROM told_scores WHERE origin = 'job' AND at > ?",
            (time.time() - _DAY_S,),
        ).fetchone()
        return int(count)


def key_of(task: str, settings: Mapping[str, Setting], digest: str) -> str:
    """Equal for evaluations with the same result."""
    skipped = personalization.SETTINGS | _ORDER
    chosen = sorted((name, value) for name, value in settings.items() if name not in skipped)
    return hashlib.sha256(msgspec.json.encode([task, chosen, digest])).hexdigest()


def blur(
    done: Done,
    min_count: int,
    chance_of: Callable[[int, int], random.Random] = lambda count, right: random.SystemRandom(),
) -> Score:
    """The accuracy with noise, so that no model shows by it whether one row is there.

    A row changes the number of correct rows by 1; discrete Laplace noise of the scale `min_count`
    makes this (1 / `min_count`)-differentially private (Ghosh et al., 2009). One row can change a
    loss without bound, so no noise is enough for it. `chance_of(count, right)` returns the random
    numbers. Raises Refused for a task without accuracy.
    """
    accuracy = done.metrics.get("accuracy")
    if accuracy is None or not math.isfinite(accuracy):
        raise Refused(
            "of a model that this machine has not evaluated in a run, only the accuracy "
            "is told, and this task has none"
        )
    count = done.num_examples
    right = math.floor(min(max(accuracy, 0.0), 1.0) * count + 1e-6)
    chance = chance_of(count, right)
    noise = _draw(chance, min_count) - _draw(chance, min_count)
    noisy = min(max(right + noise, 0), count)
    return Score(count, {"accuracy": noisy / count})


def blur_cost(min_count: int) -> tuple[Event, ...]:
    """What a blurred score costs."""
    return (DiscreteLaplace(1 / min_count),)


def _draw(chance: random.Random, scale: int) -> int:
    """A number of a geometric distribution: two of them differ by discrete Laplace noise."""
    uniform = 1.0 - chance.random()  # in (0, 1]
    return math.floor(-math.log(uniform) * scale)
