"""Writes predictions batch by batch as CSV, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from protocols.errors import UsageError
from protocols.extras import needs_extra
from protocols.local.atomic_files import replacing
from protocols.local.os_errors import os_errors_as
from protocols.local.spreadsheets import escape_formula

Batch = Mapping[str, Any]

SUFFIXES = (".csv", ".jsonl", ".parquet")


def write(batches: Iterable[Batch], out: Path | None) -> int:
    """Writes all batches to `out`, or as CSV to standard output; returns the number of rows.

    The file appears when it is complete. Raises UsageError, MissingPackage, and the task's
    errors.
    """
    if out is None:
        return _csv(batches, sys.stdout)
    if out.suffix not in SUFFIXES:
        raise UsageError(
            f"cannot write {out.suffix or 'a file without a suffix'}", "--out NAME.csv"
        )
    if not out.absolute().parent.is_dir():
        raise UsageError(
            f"there is no folder {out.absolute().parent}",
            "create it, or name another file with --out",
        )
    with _writable(out) as file:
        if out.suffix == ".parquet":
            return _parquet(batches, file)
        with _text(file) as text:
            return _csv(batches, text) if out.suffix == ".csv" else _json_lines(batches, text)


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[IO[bytes]]:
    """The file to write. Raises UsageError if it cannot be."""
    failed = os_errors_as(UsageError, f"cannot write {out}", "--out NAME.csv in another folder")
    with failed, replacing(out) as file:
        yield file


@contextlib.contextmanager
def _text(file: IO[bytes]) -> Iterator[IO[str]]:
    """Wraps the file as text; the file stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
    finally:
        text.detach()


def _csv(batches: Iterable[Batch], text: IO[str]) -> int:
    count, writer = 0, csv.writer(text, lineterminator="\n")
    for batch in batches:
        if not count:
            writer.writerow(map(escape_formula, batch))
        for row in zip(*map(_plain, batch.values()), strict=True):
            writer.writerow(map(escape_formula, row))
            count += 1
    return count


def _json_lines(batches: Iterable[Batch], text: IO[str]) -> int:
    count = 0
    for batch in batches:
        for row in zip(*map(_plain, batch.values()), strict=True):
            text.write(json.dumps(dict(zip(batch, row, strict=True)), ensure_ascii=False) + "\n")
            count += 1
    return count


def _parquet(batches: Iterable[Batch], file: IO[bytes]) -> int:
    with needs_extra("tabular", "Parquet", "--out NAME.csv"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    count, writer = 0, None
    try:
        for batch in batches:
            table = pa.table({name: list(_plain(column)) for name, column in batch.items()})
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count


def _plain(column: Any) -> Iterable[Any]:
    """Converts a column to plain Python values."""
    if hasattr(column, "tolist"):
        column = column.tolist()
    return list(column)
