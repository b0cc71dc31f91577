"""CSV files of plain numbers, for predictions.

A row is one flattened example. The first line has the names of the columns; a column "label" is
ignored, so that files with labels work too.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from agent.tasks.training.batch_size import is_out_of_memory
from protocols.errors import DataError

T = TypeVar("T")

_BATCH = 1024
LABEL = "label"
#: Names of a column with the classes, which is left out where the model has no input for it.
_TARGETS = frozenset({"class", "label", "target", "y"})
#: Columns that an error names.
_MAX_SHOWN = 20


class Table:
    """The rows of a CSV file in batches `dtype[n, columns]`, n up to 1024.

    With 0 `columns` it may have any number of them. Iterating raises DataError.
    """

    def __init__(
        self,
        source: str,
        dtype: npt.DTypeLike = np.float32,
        what: str = "a number",
        columns: int = 0,
    ) -> None:
        self._path, self._dtype, self._what, self._columns = Path(source), dtype, what, columns
        self._names: list[str] = []
        #: The places of the columns that are read.
        self._chosen: list[int] = []

    @property
    def names(self) -> list[str]:
        """The names of the columns that are read."""
        return [self._names[place] for place in self._chosen]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        count, what = self._columns, self._what
        wanted = f"{count} columns" if count else "columns of numbers"
        if not self._path.exists():
            raise DataError("there is no such file to predict for", str(self._path))
        if self._path.suffix.lower() != ".csv" or not self._path.is_file():
            more = " or a .npy file; others need a method inputs(path, settings)"
            each = f", each {what}" if count else more
            found = f"{self._path} is a folder" if self._path.is_dir() else f"found: {self._path}"
            raise DataError(f"this task predicts for a CSV file: {wanted}{each}", found)
        try:
            with self._path.open(newline="", encoding="utf-8-sig") as file:
                self._names = [name.strip() for name in next(csv.reader(file), [])]
                self._chosen = [n for n, name in enumerate(self._names) if name != LABEL]
                if count and len(self._chosen) != count:
                    raise DataError(
                        f"the table has {len(self._chosen)} columns, and {count} are needed, "
                        f"each {what}",
                        "a line of names, then an example a line",
                    )
                first = 2
                while lines := list(islice(file, _BATCH)):
                    yield _numbers(lines, first, self._chosen, self._dtype, what)
                    first += len(lines)
        except UnicodeDecodeError as err:
            raise DataError("a file is no UTF-8 text", str(self._path)) from err

    def drop_target(self) -> list[int]:
        """Read no column that has the classes from here on: one that is called so. The places of
        the others in the batches so far; empty if there is none."""
        known = [place for place, name in enumerate(self.names) if name.lower() in _TARGETS]
        if len(known) != 1:
            return []
        kept = [place for place in range(len(self._chosen)) if place not in known]
        self._chosen = [self._chosen[place] for place in kept]
        return kept


def fitted(call: Callable[[Any], T], x: Any, inputs: object) -> T:
    """`call(x)` for a batch [n, columns] of `inputs`. If these are a table whose columns the model
    cannot take, it is called without the one that has the classes. Raises DataError.
    """
    if not isinstance(inputs, Table):
        return call(x)
    names = inputs.names
    try:
        return call(x)
    except (ValueError, RuntimeError, TypeError) as err:
        if is_out_of_memory(err):
            raise
        failed = err
    if kept := inputs.drop_target():
        with contextlib.suppress(ValueError, RuntimeError, TypeError):
            return call(x[:, kept])
    shown = ", ".join(names[:_MAX_SHOWN]) + (", …" if len(names) > _MAX_SHOWN else "")
    raise DataError(
        f"the model cannot take the {len(names)} columns of the table: {failed}",
        f"it has {shown}; predictions need those of the training data without the class, in the "
        "same order",
    ) from failed


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
