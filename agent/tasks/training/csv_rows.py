"""CSV files of plain numbers, for predictions of the demo tasks.

A row is one flattened example. The first line has the names of the columns; a column "label" is
ignored, so that files with labels work too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protocols.errors import DataError

_BATCH = 1024
LABEL = "label"


def read_batches(
    source: str, columns: int, dtype: npt.DTypeLike, what: str
) -> Iterator[npt.NDArray[Any]]:
    """The rows of a CSV file, `dtype[n, columns]` for n up to 1024; `what` describes a valid value.

    With 0 `columns` the file may have any number of them. Raises DataError.
    """
    path, wanted = Path(source), f"{columns} columns" if columns else "columns of numbers"
    if path.suffix.lower() != ".csv" or not path.is_file():
        raise DataError(f"the rows are in no CSV file: {wanted}, each {what}", f"found: {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file), [])
            chosen = [place for place, name in enumerate(names) if name.strip() != LABEL]
            if len(chosen) != columns and columns:
                raise DataError(
                    f"the table has {len(chosen)} columns, and {columns} are needed, each {what}",
                    "a line of names, then an example a line",
                )
            first = 2
            while lines := list(islice(file, _BATCH)):
                yield _numbers(lines, first, chosen, dtype, what)
                first += len(lines)
    except UnicodeDecodeError as err:
        raise DataError("a file is no UTF-8 text", str(path)) from err


def _numbers(
    lines: list[str], first: int, chosen: list[int], dtype: npt.DTypeLike, what: str
) -> npt.NDArray[Any]:
    try:
        found = np.loadtxt(lines, dtype, delimiter=",", usecols=chosen, ndmin=2, quotechar='"')
    except ValueError as err:
        last = first + len(lines) - 1
        raise DataError(f"in lines {first} to {last} a value is missing or is not {what}") from err
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise DataError(f"a value is missing or is not {what}")
    return found
