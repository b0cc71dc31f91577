"""Keyed hashes of the rows of a table, the same for a CSV and a Parquet file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from agent.data import Reader, column_types

Hashes = npt.NDArray[np.uint64]

#: Numbers that a float64 has exactly: 1.50 and 1.5 are the same value.
_NUMBER = r"^[+-]?[0-9]{1,15}(\.[0-9]+)?$"
_SEPARATOR, _MISSING = "\x1f", "\x00"


def hash_rows(reader: Reader, choices: Sequence[Sequence[str]], key: bytes) -> list[Hashes]:
    """For each choice of columns, the hash of each row over them: uint64[n]; empty for none."""
    names = sorted({name for choice in choices for name in choice})
    none = np.zeros(0, np.uint64)
    parts: list[list[Hashes]] = [[none] for _ in choices]
    for batch in reader.batches(names):
        texts = {name: _canonical(batch.column(name)) for name in names}
        for part, choice in zip(parts, choices, strict=True):
            if choice and len(batch):
                part.append(_hash([texts[name] for name in choice], key))
    return [np.concatenate(part) for part in parts]


def _hash(columns: Sequence[pa.Array], key: bytes) -> Hashes:
    joined = pc.binary_join_element_wise(
        *columns,
        pa.scalar(_SEPARATOR, pa.large_string()),
        null_handling="replace",
        null_replacement=_MISSING,
    )
    _, offsets, data = joined.buffers()
    ends = np.frombuffer(offsets, np.int64)[joined.offset : joined.offset + len(joined) + 1]
    view = memoryview(data or b"")
    digests = [
        hashlib.blake2b(view[start:end], digest_size=8, key=key).digest()
        for start, end in pairwise(ends.tolist())
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def _canonical(column: pa.Array) -> pa.Array:
    """The values as text, the same for a CSV and a Parquet file; null where missing."""
    try:
        texts = column_types.texts(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # lists, structs, bytes
        return pa.array([repr(value) for value in column.to_pylist()], pa.large_string())
    is_number = pc.fill_null(pc.match_substring_regex(texts, _NUMBER), False)
    if pc.any(is_number).as_py():
        number = column_types.texts(pc.if_else(is_number, texts, None).cast(pa.float64()))
        texts = pc.if_else(is_number, number, texts)
    return texts.cast(pa.large_string())
