"""Tables that come as rows: sheets of Excel, DuckDB files, and databases by SQLAlchemy.

All values become text, as those of a CSV file, so that `column_types` interprets them in the same
way. Databases are opened for reading only.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from agent.data import sources
from agent.data.arrow_reader import align_columns, check_names
from agent.data.reader import Reader
from agent.data.sources import Source
from protocols.errors import DataError
from protocols.extras import needs_extra

Row = Sequence[Any]

_ROWS = 16_384


class RowReader(Reader):
    """One pass over the rows for each call; the table may be larger than memory."""

    def __init__(self, source: Source) -> None:
        sources.check(source)
        self._source = source
        self._open = {"excel": _open_sheet, "duckdb": _open_duckdb, "sql": _open_database}[
            source.kind
        ]

    @cached_property
    def _names(self) -> list[str]:
        with self._opened() as (names, _):
            return check_names(names, self._source.address)

    def columns(self) -> tuple[str, ...]:
        return tuple(self._names)

    def fingerprint(self) -> str:
        """A hash of all values, in the order of the rows."""
        found = hashlib.blake2b(digest_size=16)
        for batch in self.batches(self.columns()):
            for column in batch.columns:
                found.update(repr(column.to_pylist()).encode())
        return found.hexdigest()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = set(columns)
        places = [(place, name) for place, name in enumerate(self._names) if name in wanted]
        with self._opened() as (_, blocks):
            for rows in blocks:
                texts = [
                    pa.array([to_text(row[place]) for row in rows], pa.string())
                    for place, _ in places
                ]
                batch = pa.RecordBatch.from_arrays(texts, names=[name for _, name in places])
                yield align_columns(batch, columns) if columns else batch

    @contextmanager
    def _opened(self) -> Iterator[tuple[list[str], Iterator[Sequence[Row]]]]:
        with (
            needs_extra("sources", f"reading {self._source.kind} tables"),
            self._open(self._source) as (names, blocks),
        ):
            yield names, blocks


def to_text(value: object) -> str | None:
    """A value as a CSV file would have it; None for a missing value, and for bytes."""
    match value:
        case None | bytes() | bytearray() | memoryview():
            return None
        case bool():
            return "true" if value else "false"
        case float():
            return None if math.isnan(value) else repr(value)
        case Decimal():
            return format(value, "f")
        case datetime.datetime():
            return value.isoformat(sep=" ")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return repr(value.total_seconds())
    return str(value)


@contextmanager
def _open_sheet(source: Source) -> Iterator[tuple[list[str], Iterator[Sequence[Row]]]]:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(source.address, read_only=True, data_only=True)
    except OSError as err:
        raise DataError("a file cannot be read", f"{source.address}: {err.strerror}") from err
    except (InvalidFileException, KeyError, ValueError, SyntaxError) as err:
        raise DataError("a file is no workbook of Excel", f"{source.address}: {err}") from err
    except Exception as err:
        if type(err).__name__ != "BadZipFile":
            raise
        raise DataError("a file is no workbook of Excel", source.address) from err
    try:
        name = source.sheet or book.sheetnames[0]
        if name not in book.sheetnames:
            there = ", ".join(book.sheetnames[:20])
            raise DataError("the workbook has no such sheet", f"{name!r}; there are {there}")
        rows = book[name].iter_rows(values_only=True)
        header = list(next(rows, ()))
        while header and header[-1] is None:
            header.pop()
        names = [to_text(cell) or "" for cell in header]
        yield names, _in_blocks(_rows_of_sheet(rows, len(names)))
    finally:
        book.close()


def _rows_of_sheet(rows: Iterator[Row], width: int) -> Iterator[Row]:
    """The rows that are not empty. Raises DataError for a value beyond the header."""
    for number, row in enumerate(rows, 2):
        if any(cell is not None for cell in row[width:]):
            raise DataError(
                "a sheet has values in a column without a name",
                f"row {number}: write a name above each column in the first row, also where header "
                "cells were merged, and delete a title above the header",
            )
        if any(cell is not None for cell in row):
            yield row


@contextmanager
def _open_duckdb(source: Source) -> Iterator[tuple[list[str], Iterator[Sequence[Row]]]]:
    import duckdb

    if not Path(source.address).exists():  # DuckDB would report that it cannot create the file
        raise DataError("a file cannot be read", f"{source.address}: no such file")
    try:
        with duckdb.connect(source.address, read_only=True) as database:
            query = source.query or f"SELECT * FROM {_quoted(source.table)}"
            result = database.execute(query)
            names = [str(column[0]) for column in result.description or ()]
            yield names, iter(partial(result.fetchmany, _ROWS), [])
    except duckdb.Error as err:
        raise DataError("the database cannot be read", _first_line(err)) from err


@contextmanager
def _open_database(source: Source) -> Iterator[tuple[list[str], Iterator[Sequence[Row]]]]:
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    if source.query:  # a colon starts no parameter
        statement: Any = sqlalchemy.text(re.sub(r"(?<![:\w\\]):(?=\w)", r"\\:", source.query))
    else:
        schema, _, table = source.table.rpartition(".")
        found = sqlalchemy.table(table, schema=schema or None)
        statement = sqlalchemy.select(sqlalchemy.text("*")).select_from(found)
    try:
        engine = _engine(source)
        try:
            with engine.connect().execution_options(
                stream_results=True, yield_per=_ROWS, postgresql_readonly=True
            ) as connection:
                result = connection.execute(statement)
                yield list(result.keys()), iter(partial(result.fetchmany, _ROWS), [])
        finally:
            engine.dispose()
    except (ArgumentError, NoSuchModuleError) as err:
        raise DataError("the address of the database cannot be used", _first_line(err)) from err
    except SQLAlchemyError as err:
        why = getattr(err, "orig", None) or err
        raise DataError("the database cannot be read", _first_line(why)) from err


def _engine(source: Source) -> Any:
    """A SQLAlchemy engine for reading. Raises its errors."""
    import sqlalchemy
    from sqlalchemy.pool import NullPool

    from agent.data.passwords import password_of

    if not source.is_remote:
        name = f"file:{quote(source.file)}?mode=ro"
        return sqlalchemy.create_engine(
            "sqlite://", creator=partial(sqlite3.connect, name, uri=True), poolclass=NullPool
        )
    url = sqlalchemy.make_url(source.address)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if password := password_of(source):
        url = url.set(password=password)
    return sqlalchemy.create_engine(url, poolclass=NullPool)


def _in_blocks(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    block: list[Row] = []
    for row in rows:
        block.append(row)
        if len(block) == _ROWS:
            yield block
            block = []
    if block:
        yield block


def _quoted(table: str) -> str:
    """A name, perhaps with a schema, for SQL."""
    return ".".join('"{}"'.format(part.replace('"', '""')) for part in table.split("."))


def _first_line(err: object) -> str:
    return str(err).strip().partition("\n")[0][:500]
