"""A report for the owner alone: what would leave of a table, and what is odd about it.

It runs `profile.survey` as a run of the task `tabular` does, so it shows exactly what leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from msgspec import Struct

from agent.data import Reader, column_types, odd_values, profile
from agent.data.profile import KindAggregation, StatisticsAggregation
from agent.data.settings import DataSettings
from protocols.errors import DataError
from protocols.tables import class_weights
from protocols.tables.preprocessing import TableSettings
from protocols.tables.statistics import ColumnStatistics, TableStatistics

#: Rows in which different values are counted.
SAMPLE_ROWS = 100_000
_SHOWN = 3
#: Rows at the end of the table that are looked at one by one.
_LAST_ROWS = 100
#: Above this share of the rows, missing values are many.
_MANY_MISSING = 0.5


class ColumnReport(Struct, frozen=True):
    """`told`: what a run would get. `stays`: how many rare values it would not get."""

    name: str
    kind: str
    missing: int
    told: str
    stays: int = 0
    notes: tuple[str, ...] = ()


class TableReport(Struct, frozen=True):
    """A table, as its owner sees it. `notes` are about the whole table."""

    rows: int
    columns: tuple[ColumnReport, ...]
    notes: tuple[str, ...] = ()


def report(reader: Reader, data: DataSettings, target: str = "") -> TableReport:
    """The report of a table, two passes and a sample. Raises DataError, and what `survey` does."""
    names = reader.columns()
    kinds = reader.aggregate(KindAggregation(), names)
    if kinds is None:
        raise DataError("this peer's table has no rows")
    if target and target not in names:
        raise DataError(f"the table has no column {target!r}", f"there are {', '.join(names[:20])}")
    measure = StatisticsAggregation({name: kinds[name].kind for name in names}, frozenset({target}))
    own = reader.aggregate(measure, names)
    assert own is not None
    told = _told(reader, data, target)
    sample, last = _sample(reader, names)
    columns = []
    for name, column in own.columns.items():
        values = [value for value in sample[name].to_pylist() if value is not None]
        notes = list(_odd_values(name, column, kinds[name].written, values))
        notes += _notes(name, column, own.rows, (len(values), len(set(values))), bool(notes))
        notes += _target_notes(column, data.min_count) if name == target else []
        rare = sum(count < data.min_count for count in column.categories.values())
        kind, text = column.kind, _describe_told(told.columns.get(name))
        columns.append(ColumnReport(name, kind, column.missing, text, rare, tuple(notes)))
    odd = (*odd_values.header_notes(names), *odd_values.row_notes(last))
    return TableReport(own.rows, tuple(columns), (*_table_notes(own, told, data), *odd))


def _odd_values(
    name: str, column: ColumnStatistics, written: str, values: Sequence[str]
) -> Iterable[str]:
    """Notes about odd values in a sample."""
    match column.kind:
        case "text" if written:
            how = odd_values.number_format_note if written == "comma" else odd_values.date_note
            like = "numbers like 1.234,5" if written == "comma" else "dates like 31.3.2024"
            yield f"{like}: {how(name, values)}"
        case "text":
            yield from odd_values.text_notes(name, odd_values.sorted_counts(values))
        case "number" if values:
            numbers = column_types.numbers(pa.array(values, pa.string()), "number")
            yield from odd_values.number_notes(name, numbers[~np.isnan(numbers)])


def _told(reader: Reader, data: DataSettings, target: str) -> TableStatistics:
    settings = TableSettings(target, "auto", (), frozenset(), "standard", False)
    try:
        return profile.survey(reader, data, settings)
    except DataError:  # too few rows for the owner's limits: nothing leaves
        return TableStatistics(rows=0, columns={})


def _describe_told(column: ColumnStatistics | None) -> str:
    if column is None:
        return "nothing"
    match column:
        case ColumnStatistics(kind="empty"):
            return "that it is empty"
        case ColumnStatistics(kind="text", many=True):
            return "that it has many values"
        case ColumnStatistics(kind="text", categories=counts, others=others):
            shown = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
            parts = [f"{value} {count:,}" for value, count in shown[:_SHOWN]]
            parts += [f"… {len(shown)} values"] if len(shown) > _SHOWN else []
            return ", ".join([*parts, *([f"other {others:,}"] if others else [])])
    moments = column.moments
    if not moments.count:
        return "that all values are missing"
    sd = f"{moments.variance**0.5:.4g}"
    if column.kind == "date":
        mean = np.datetime64("1970-01-01") + np.timedelta64(round(moments.mean), "D")
        return f"mean {mean}, sd {sd} days of {moments.count:,}"
    return f"mean {moments.mean:.4g}, sd {sd} of {moments.count:,}"


def _notes(
    name: str, column: ColumnStatistics, rows: int, different: tuple[int, int], is_odd: bool
) -> list[str]:
    """`different`: the values of the sample, and how many of them are different. `is_odd`: its
    values are no texts as they should be."""
    notes = []
    values, distinct = different
    is_text = column.kind == "text"
    if is_odd and is_text:
        pass
    elif (
        values > 1
        and distinct == values
        and (is_text or (column.whole and profile.is_named_id(name)))
    ):
        notes.append("each row has another value, as in an identifier: a run leaves it out")
    elif is_text and column.many:
        notes.append("too many values for categories: a run leaves it out")
    elif distinct == 1 and not column.missing:
        notes.append("one value only, which tells a model nothing")
    if column.kind != "empty" and column.missing > _MANY_MISSING * rows:
        notes.append(f"{column.missing / rows:.0%} are missing")
    return notes


def _target_notes(column: ColumnStatistics, min_count: int) -> list[str]:
    missing = "1 row has" if column.missing == 1 else f"{column.missing:,} rows have"
    notes = [f"{missing} no target: not used"] if column.missing else []
    rare = [value for value, count in column.categories.items() if count < min_count]
    if rare:
        notes.append(f"classes of fewer than {min_count} rows are left out: {', '.join(rare[:8])}")
    elif hint := class_weights.rare_class_hint(column.categories):
        notes.append(f"{hint}; the operator can start the run with {class_weights.BALANCED}")
    return notes


def _table_notes(own: TableStatistics, told: TableStatistics, data: DataSettings) -> list[str]:
    if own.rows < data.min_rows:
        return [f"fewer rows than data.min_rows ({data.min_rows}): no run gets anything"]
    withheld = [name for name in own.columns if name not in told.columns]
    notes = [f"not among data.columns: {', '.join(withheld)}"] if withheld else []
    if own.rows < 2 * data.min_count:
        notes.append(f"very few rows; nothing of fewer than {data.min_count} rows leaves")
    return notes


def _sample(
    reader: Reader, names: Sequence[str]
) -> tuple[dict[str, pa.ChunkedArray], list[list[str | None]]]:
    """The texts of the first rows by column, and the last rows of the table."""
    batches: list[pa.RecordBatch] = []
    rows, last = 0, None
    for batch in reader.batches(names):
        if rows < SAMPLE_ROWS:
            batches.append(batch)
            rows += len(batch)
        last = batch if len(batch) else last
    columns = {
        name: pa.chunked_array([column_types.texts(b.column(name)) for b in batches], pa.string())
        for name in names
    }
    if last is None:
        return columns, []
    end = last.slice(max(0, len(last) - _LAST_ROWS))
    texts = [column_types.texts(end.column(name)).to_pylist() for name in names]
    return columns, [list(row) for row in zip(*texts, strict=True)]
