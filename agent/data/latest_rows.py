"""Which rows are the latest by a column of dates or numbers, so that a model is judged on them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agent.data import Reader, column_types
from agent.data.admission import HELD_OUT_OF, Mask
from agent.data.profile import KindAggregation
from protocols.errors import DataError, SchemaMismatch
from protocols.tables import statistics
from protocols.tables.statistics import NUMERIC, ColumnStatistics


def read_times(reader: Reader, column: str) -> npt.NDArray[np.float64]:
    """The column's values float64[n], a date as days since 1970; NaN where missing.

    Raises SchemaMismatch for a column that is missing, or has neither dates nor numbers.
    """
    expected = "dates or numbers, by which rows are held out"
    if column not in reader.columns():
        raise SchemaMismatch(f"column {column}", expected, "no such column")
    kinds = (reader.aggregate(KindAggregation(), [column]) or {}).get(column)
    if kinds is None or kinds.kind not in NUMERIC:
        found = ColumnStatistics(
            kind=kinds.kind if kinds else "empty", written=kinds.written if kinds else ""
        )
        raise SchemaMismatch(f"column {column}", expected, statistics.describe_kind(found))
    parts = [
        column_types.numbers(batch.column(column), kinds.kind) for batch in reader.batches([column])
    ]
    return np.concatenate([np.zeros(0), *parts])


def latest(times: npt.NDArray[np.float64], column: str) -> Mask:
    """bool[n]: the rows with the greatest times, as close to a fifth of them as ties allow, as rows
    of one time are on one side. Raises DataError if the fewest latest rows are more than half."""
    ordered, counts = np.unique(times, return_counts=True)
    after = np.cumsum(counts[::-1])[::-1][1:]
    cut = int(np.abs(after * HELD_OUT_OF - len(times)).argmin()) if len(after) else 0
    if not len(after) or 2 * after[cut] > len(times):
        raise DataError(
            f"no rows are later than most others by the column {column}, so none can be held out",
            "the same value is in more than half of the rows: choose another split_by column",
        )
    return np.asarray(times >= ordered[cut + 1])


def latest_of_more(times: npt.NDArray[np.float64], column: str, min_rows: int) -> Mask:
    """`latest` of rows that came later; none of them if fewer than `min_rows` would be held out."""
    try:
        found = latest(times, column)
    except DataError:
        return np.zeros(len(times), bool)
    return found if found.sum() >= min_rows else np.zeros(len(times), bool)
