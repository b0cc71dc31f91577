"""Encodes rows as model inputs, with the preprocessing that all peers share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from agent.data import Reader, column_types
from agent.data.admission import HELD_OUT_OF, Mask, Split
from agent.data.rare_values import (
    FIRST,
    MISSING,
    UNSEEN,
    Vocabulary,
    replace_rare_categories,
    replace_rare_gaps,
    replace_rare_numbers,
)
from protocols.errors import SchemaMismatch
from protocols.tables.preprocessing import Feature, Preprocessing
from protocols.tables.statistics import (
    NUMERIC,
    ColumnKind,
    ColumnStatistics,
    describe_kind,
    hash_category,
)

#: More than this goes to a memory-mapped file.
IN_MEMORY_BYTES = 512 << 20

Floats = npt.NDArray[np.float32]


class EncodedRows(NamedTuple):
    """Inputs float32[n, d] and targets: int64[n] classes or float32[n, 1], scaled."""

    x: Floats
    y: npt.NDArray[Any]


def input_width(preprocessing: Preprocessing) -> tuple[int, int]:
    """The number of numeric and of categorical inputs; the latter come last."""
    numeric = preprocessing.numeric
    return len(numeric) + sum(f.missing for f in numeric), len(preprocessing.categorical)


def encode_inputs(
    batch: pa.RecordBatch,
    preprocessing: Preprocessing,
    vocabularies: Mapping[str, Vocabulary] | None = None,
) -> Floats:
    """The features of a batch: float32[n, d]. Absent columns count as missing.

    Categories are those of the preprocessing, or the numbers of `vocabularies`.
    """
    columns: list[npt.NDArray[Any]] = []
    gaps: list[npt.NDArray[Any]] = []
    for feature in preprocessing.numeric:
        found = _numbers(_column(batch, feature), feature.name, feature.kind)
        there = ~np.isnan(found)
        columns.append(np.where(there, (found - feature.mean) / feature.scale, 0.0))
        if feature.missing:
            gaps.append(~there)
    indices = [
        _indices(_column(batch, feature), feature, preprocessing.hashed)
        if vocabularies is None
        else vocabularies[feature.name].encode(column_types.texts(_column(batch, feature)))
        for feature in preprocessing.categorical
    ]
    made = np.empty((len(batch), len(columns) + len(gaps) + len(indices)), np.float32)
    for place, column in enumerate((*columns, *gaps, *indices)):
        made[:, place] = column
    return made


def encode_targets(batch: pa.RecordBatch, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Classes as int64[n], -1 for none of them; or scaled numbers as float32[n, 1], else NaN."""
    target = preprocessing.target
    column = batch.column(target.name)
    if not target.classes:
        found = (_numbers(column, target.name, target.kind) - target.mean) / target.scale
        return found.astype(np.float32)[:, None]
    if target.kind in NUMERIC:
        texts = column_types.whole_texts(_numbers(column, target.name, target.kind))
    else:
        texts = column_types.texts(column)
    found = pc.fill_null(pc.index_in(texts, value_set=pa.array(target.classes)), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _numbers(column: pa.Array, name: str, kind: ColumnKind) -> npt.NDArray[np.float64]:
    """`column_types.numbers`. Raises SchemaMismatch, which quotes no value, for other texts."""
    try:
        return column_types.numbers(column, kind)
    except pa.ArrowInvalid as err:
        kinds = column_types.possible_kinds(column)
        found = ColumnStatistics(kind=kinds.kind, written=kinds.written)
        raise SchemaMismatch(f"column {name}", kind, describe_kind(found)) from err


def _column(batch: pa.RecordBatch, feature: Feature) -> pa.Array:
    if feature.name in batch.schema.names:
        return batch.column(feature.name)
    return pa.nulls(len(batch), pa.string())


def _indices(column: pa.Array, feature: Feature, hashed: bool) -> npt.NDArray[Any]:
    texts = column_types.texts(column)
    if hashed:
        coded = texts.dictionary_encode()
        names = [hash_category(feature.name, text) for text in coded.dictionary.to_pylist()]
        texts = pa.array(names, pa.string()).take(coded.indices)
    known = pa.array(feature.categories, pa.string())
    found = pc.fill_null(pc.index_in(texts, value_set=known), UNSEEN - FIRST)
    missing = np.asarray(pc.is_null(texts).to_numpy(zero_copy_only=False))
    indices = np.asarray(found.to_numpy(zero_copy_only=False)) + FIRST
    return np.where(missing, MISSING, indices)


class EncodedTable(NamedTuple):
    """A peer's rows, to train on and held out; `dropped` rows have no known target."""

    trained_on: EncodedRows
    held_out: EncodedRows
    dropped: int


def read_classes(reader: Reader, preprocessing: Preprocessing) -> npt.NDArray[np.int64]:
    """int64[n]: the class of each row, 0 if the target is a number, -1 if no peer can use it."""
    none = np.zeros(0, np.int64)
    found = [none]
    for batch in reader.batches([preprocessing.target.name]):
        y = encode_targets(batch, preprocessing)
        known = _is_known(y, preprocessing)
        found.append(y if preprocessing.target.classes else known.astype(np.int64) - 1)
    return np.concatenate(found)


def encode_table(
    reader: Reader,
    preprocessing: Preprocessing,
    chance: np.random.RandomState,
    folder: Path,
    split: Split | None = None,
    min_rows: int = 1,
) -> EncodedTable:
    """All rows of a table, or those of `split`. Large tables go to an unnamed file in `folder`.

    Values that fewer than `min_rows` rows of a part have are replaced (`rare_values`).
    """
    here = set(reader.columns())
    names = [f.name for f in preprocessing.features if f.name in here]
    numbers, categories = input_width(preprocessing)
    is_class = bool(preprocessing.target.classes)
    spools = [_Spool(numbers + categories, is_class, folder) for _ in range(2)]
    places = _held_out(chance)
    vocabularies = {feature.name: Vocabulary() for feature in preprocessing.categorical}
    first = dropped = 0
    for batch in reader.batches([*names, preprocessing.target.name]):
        x = encode_inputs(batch, preprocessing, vocabularies)
        y = encode_targets(batch, preprocessing)
        known = _is_known(y, preprocessing)
        if split is None:
            out = np.zeros(len(y), bool)
            out[known] = np.fromiter(places, bool, int(known.sum()))
            train = known & ~out
        else:
            train, out = (part[first : first + len(batch)] for part in split)
        first += len(batch)
        dropped += int((~known).sum())
        spools[0].append(x[train], y[train])
        spools[1].append(x[out], y[out])
    table = EncodedTable(spools[0].rows(), spools[1].rows(), dropped)
    for part in (table.trained_on, table.held_out):
        _replace_rare(part.x, preprocessing, vocabularies, min_rows)
        if not preprocessing.target.classes:
            replace_rare_numbers(part.y[:, 0], min_rows)
    return table


def _replace_rare(
    x: Floats,
    preprocessing: Preprocessing,
    vocabularies: Mapping[str, Vocabulary],
    min_rows: int,
) -> None:
    """Replace rare values in place, and put categories in place of the vocabularies' numbers."""
    numeric = preprocessing.numeric
    place = len(numeric)
    for column, feature in enumerate(numeric):
        if feature.missing:
            replace_rare_gaps(x[:, column], x[:, place], min_rows)
            place += 1
        replace_rare_numbers(x[:, column], min_rows)
    indices = [
        vocabularies[feature.name].indices(feature.name, feature.categories, preprocessing.hashed)
        for feature in preprocessing.categorical
    ]
    replace_rare_categories(x[:, place:], indices, min_rows)


def _is_known(y: npt.NDArray[Any], preprocessing: Preprocessing) -> Mask:
    return np.asarray(y >= 0 if preprocessing.target.classes else ~np.isnan(y[:, 0]))


def draw_held_out(chance: np.random.RandomState, count: int) -> Mask:
    """bool[n]: which of new rows to hold out."""
    return np.fromiter(_held_out(chance), bool, count)


def _held_out(chance: np.random.RandomState) -> Iterator[bool]:
    """For each row, whether it is held out: one random row of each group of this size. It does not
    depend on the sizes of batches."""
    while True:
        place = chance.randint(HELD_OUT_OF)
        yield from (number == place for number in range(HELD_OUT_OF))


class _Spool:
    """A list of rows, in memory while there are few."""

    def __init__(self, width: int, is_class: bool, folder: Path) -> None:
        self._width, self._folder = width, folder
        self._y = np.dtype(np.int64 if is_class else np.float32)
        self._kept: list[EncodedRows] = []
        self._bytes = self._count = 0
        self._files: tuple[IO[bytes], IO[bytes]] | None = None

    def append(self, x: Floats, y: npt.NDArray[Any]) -> None:
        self._kept.append(EncodedRows(x, y))
        self._bytes += x.nbytes + y.nbytes
        self._count += len(y)
        if self._files is not None or self._bytes > IN_MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._files is None:
            # Unnamed files: their content is gone when this process ends, however it ends.
            first = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            self._files = first, tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        for rows in self._kept:
            self._files[0].write(np.ascontiguousarray(rows.x).data)
            self._files[1].write(np.ascontiguousarray(rows.y).data)
        self._kept = []

    def rows(self) -> EncodedRows:
        shape = () if self._y == np.int64 else (1,)
        if self._files is None:
            if not self._kept:
                return EncodedRows(
                    np.empty((0, self._width), np.float32), np.empty((0, *shape), self._y)
                )
            x, y = zip(*self._kept, strict=True)
            return EncodedRows(np.concatenate(x), np.concatenate(y))
        for file in self._files:
            file.flush()
        x_file, y_file = self._files
        return EncodedRows(
            np.memmap(x_file, np.float32, "r+", shape=(self._count, self._width)),
            np.memmap(y_file, self._y, "r+", shape=(self._count, *shape)),
        )
