"""The record of the owner's rows: which may be used, and what was disclosed about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from agent.data import Aggregation, Reader, merge_states
from agent.data.admission import Admission, Mask
from agent.data.disclosed_sets import DisclosedSets, Numbers
from agent.data.row_registry import RowRegistry
from protocols.errors import DataError

S = TypeVar("S")


class AdmittedRows(NamedTuple):
    """A table's rows that may be used: a reader of these, and their numbers in its order."""

    reader: Reader
    numbers: Numbers


class TableMemory:
    """One file: the registry of rows, the admitted ones, and the sets that were told. Used by one
    thread."""

    def __init__(self, path: Path) -> None:
        self.registry = RowRegistry(path)
        self.admission = Admission(path)
        self._path = path

    @cached_property
    def sets(self) -> DisclosedSets:
        """The sets that were told. A trainer cannot open the file, and its helper records them."""
        return DisclosedSets(self._path)

    def close(self) -> None:
        for part in (self.registry, self.admission, self.__dict__.get("sets")):
            if part is not None:
                part.close()

    def admit(self, reader: Reader, min_rows: int) -> AdmittedRows:
        """The rows of a table that may be used now. Raises DataError."""
        fingerprint = reader.fingerprint()
        numbers = self.registry.positions(reader)
        admitted = self.admission.admit(numbers, min_rows, whole=True)
        return AdmittedRows(_AdmittedReader(reader, admitted, fingerprint), numbers[admitted])


class _AdmittedReader:
    """A reader without the rows that wait. It raises DataError if the table changes during the
    reading."""

    def __init__(self, reader: Reader, admitted: Mask, fingerprint: str) -> None:
        self._reader, self._admitted, self._fingerprint = reader, admitted, fingerprint

    def columns(self) -> tuple[str, ...]:
        return self._reader.columns()

    def fingerprint(self) -> str:
        return self._reader.fingerprint()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in self._reader.batches(columns):
            mask = self._admitted[first : first + len(batch)]
            first += len(batch)
            if len(mask) < len(batch):
                break
            if mask.all():
                yield batch
            elif mask.any():
                yield batch.filter(pa.array(mask))
        self._check(first == len(self._admitted))

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        if np.all(self._admitted):  # where the rows are, such as on the owner's cluster
            found = self._reader.aggregate(aggregation, columns)
            self._check()
            return found
        return merge_states(aggregation, map(aggregation.from_batch, self.batches(columns)))

    def _check(self, same: bool = True) -> None:
        if not same or self._reader.fingerprint() != self._fingerprint:
            raise DataError("the table changed while it was read", "the next try reads it again")
