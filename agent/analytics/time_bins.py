"""The time bins of earlier answers about survival, which later answers about the same can use.

Bins of a group alone and bins of all rows can, subtracted, describe a few rows. Those that were
told before never do: the rows of a group in such a bin are a sum or a difference of what was told.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from msgspec import UNSET

from protocols.analytics.mergeable_states import Cell
from protocols.analytics.model_states import SurvivalState
from protocols.analytics.query import Operation, Query

_SCHEMA = """
CREATE TABLE IF NOT EXISTS time_bins (columns TEXT, edges TEXT, PRIMARY KEY (columns, edges))
"""
#: Bins that are tried, the newest first.
_MAX_TRIES = 4


class TimeBins:
    """The bins by the columns of time and event, in the database of the log of answers."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        db.execute(_SCHEMA)

    def earlier(self, operation: Operation) -> list[tuple[float, ...]]:
        """The edges of the bins of earlier answers about these columns, the newest first."""
        rows = self._db.execute(
            "SELECT edges FROM time_bins WHERE columns = ? ORDER BY rowid DESC LIMIT ?",
            (_key(operation), _MAX_TRIES),
        )
        return [tuple(json.loads(edges)) for (edges,) in rows]

    def remember(self, question: Query, cells: Iterable[Cell]) -> None:
        """Note the bins of an answer: of survival, and of Cox models."""
        told = [*cells]
        for place, operation in enumerate(question.operations):
            states = (cell.states[place] for cell in told)
            bins = {state.edges for state in states if isinstance(state, SurvivalState)}
            if told and operation.kind == "cox" and operation.model is not UNSET:
                bins.add(operation.model.edges)
            self._db.executemany(
                "INSERT OR IGNORE INTO time_bins VALUES (?, ?)",
                [(_key(operation), json.dumps(edges)) for edges in bins if edges],
            )


def _key(operation: Operation) -> str:
    return json.dumps(operation.columns[:2])
