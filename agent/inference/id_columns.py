"""Copies a column of the input table to the predictions, so that rows keep their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from agent.data import open_table
from agent.data.settings import DataSettings
from protocols.errors import DataError, UnknownName, UsageError


def copied(
    answers: Iterable[dict[str, list[Any]]], source: str, name: str
) -> Iterator[dict[str, list[Any]]]:
    """The answers in batches, with the column `name` of the table `source` as the first.

    Raises UnknownName, UsageError, DataError.
    """
    table = open_table(DataSettings(path=source))
    if name not in (there := table.columns()):
        raise UnknownName(f"the table has no column {name!r}", f"it has {', '.join(there)}")
    values = (value for batch in table.batches([name]) for value in batch.column(0).to_pylist())
    for batch in answers:
        if name in batch:
            raise UsageError(f"the answers have a column {name!r} already", "leave out --id-column")
        rows = len(next(iter(batch.values()), ()))
        ids = [value for _, value in zip(range(rows), values, strict=False)]
        if len(ids) != rows:
            raise DataError(f"the table has fewer rows than answers in its column {name!r}")
        yield {name: ids, **batch}
