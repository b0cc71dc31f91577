"""Replaces values that few rows have, before a model sees them. Pure numpy.

The weight of a category changes by the gradients of its rows alone, so with one row it reveals that
row's target; and a coordinator may name any text as a category. In each part of a table (trained
on, held out), values of a column that fewer than `min_rows` rows have count as one unseen value; if
these rows are few too, as the column's most frequent value. The replacement depends on the table
and not on the categories of a run, so two runs with other categories differ by enough rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from protocols.tables.statistics import hash_category

#: The index of a category in the inputs of a model.
MISSING, UNSEEN, FIRST = 0, 1, 2
#: The most different values of a column that are distinguished; later ones count as rare.
_MAX_VALUES = 1 << 16
#: Rows in which a most frequent value is looked for, as a multiple of `min_rows`.
_SAMPLE = 8
_BLOCK = 1 << 16

Floats = npt.NDArray[np.float32]


class Vocabulary:
    """The values of one column, numbered in the order of first sight, from `FIRST`."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def encode(self, texts: pa.StringArray) -> npt.NDArray[np.int64]:
        """int64[n]: the number of each text, `MISSING` for null, `UNSEEN` for too many texts."""
        found = texts.dictionary_encode()
        for text in found.dictionary.to_pylist():
            if len(self._codes) < _MAX_VALUES:
                self._codes.setdefault(text, len(self._codes) + FIRST)
        codes = [self._codes.get(text, UNSEEN) for text in found.dictionary.to_pylist()]
        places = pc.fill_null(found.indices, len(codes)).to_numpy(zero_copy_only=False)
        numbers: npt.NDArray[np.int64] = np.array([*codes, MISSING], np.int64)[places]
        return numbers

    def indices(self, name: str, categories: Sequence[str], hashed: bool) -> npt.NDArray[np.int64]:
        """The index of a category for each number, int64[numbers]."""
        known = {text: place for place, text in enumerate(categories, FIRST)}
        texts = [hash_category(name, text) if hashed else text for text in self._codes]
        return np.array([MISSING, UNSEEN, *(known.get(text, UNSEEN) for text in texts)], np.int64)


def replace_rare_categories(
    codes: Floats, indices: Sequence[npt.NDArray[np.int64]], min_rows: int
) -> None:
    """Write the indices of the rows' categories into columns of `Vocabulary` numbers.

    `codes`: float32[n, k], which may lie on disk; `indices`: of each column, by number.
    """
    counts = [np.zeros(len(known), np.int64) for known in indices]
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK].astype(np.int64)
        for column, count in zip(block.T, counts, strict=True):
            count += np.bincount(column, minlength=len(count))
    merged = [_merge_rare(*of, min_rows) for of in zip(indices, counts, strict=True)]
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK].astype(np.int64)
        for place, known in enumerate(merged):
            codes[start : start + _BLOCK, place] = known[block[:, place]]


def _merge_rare(
    indices: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], min_rows: int
) -> npt.NDArray[np.int64]:
    """The index for each number that at least this many rows have."""
    rare = counts < min_rows
    rare[UNSEEN] = True
    few = counts[rare].sum() < min_rows and not rare.all()
    return np.where(rare, indices[np.where(rare, 0, counts).argmax()] if few else UNSEEN, indices)


def most_frequent(values: npt.NDArray[Any], min_rows: int) -> Any:
    """The most frequent of some values, by the first of them: right if all but a few are equal."""
    sample, counts = np.unique(values[: _SAMPLE * min_rows], return_counts=True)
    return sample[counts.argmax()]


def replace_rare_numbers(column: Floats, min_rows: int) -> None:
    """Make a column constant if fewer than `min_rows` rows differ from its most frequent value."""
    if not len(column):
        return
    frequent = most_frequent(column, min_rows)
    if np.count_nonzero(column[: _SAMPLE * min_rows] != frequent) >= min_rows:
        return  # without reading the rest, which may lie on disk
    if np.count_nonzero(column != frequent) < min_rows:
        column[:] = frequent


def replace_rare_gaps(column: Floats, gaps: Floats, min_rows: int) -> None:
    """Hide the missing values of a number (1 in `gaps`) if few are missing, and the values if few
    rows have one."""
    sample = gaps[: _SAMPLE * min_rows]
    if min_rows <= np.count_nonzero(sample) <= len(sample) - min_rows:
        return
    count = np.count_nonzero(gaps)
    if count < min_rows:
        gaps[:] = 0
    elif len(gaps) - count < min_rows:
        column[:], gaps[:] = 0, 1
