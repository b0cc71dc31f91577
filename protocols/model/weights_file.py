"""Reads and writes weights in a file piece by piece, so memory does not grow with the model.

It does not use a memory map, because the pages of one count as memory of the process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from protocols.errors import BadWeights
from protocols.local.atomic_files import replacing
from protocols.local.early_writeback import EarlyWriteback
from protocols.model.weights import (
    DTYPES,
    MAX_HEADER_BYTES,
    Array,
    Part,
    Schema,
    WeightReader,
    check_header,
    header_bytes,
    split_into_pieces,
)


class WeightsFile:
    """A canonical safetensors file that is open for reading. Raises BadWeights, OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        try:
            size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size):
                raise BadWeights(f"a header of {length} bytes in a file of {size} bytes")
            self._file.seek(0)
            self.schema, offset = check_header(self._file.read(8 + length), size)
        except BaseException:
            self._file.close()
            raise
        self.nbytes = size
        self._offsets: dict[str, int] = {}
        for name, spec in self.schema.items():
            self._offsets[name] = offset
            offset += spec.nbytes

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        dtype = DTYPES[self.schema[part.name].dtype]
        self._file.seek(self._offsets[part.name] + part.start * dtype.itemsize)
        count = part.stop - part.start
        array = np.empty(count, dtype)
        left = array.view(np.uint8).data
        while left:
            got = self._file.readinto(left)
            if not got:
                raise BadWeights("the file is truncated")
            left = left[got:]
        return array

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WeightsWriter:
    """Writes a canonical file piece by piece, in file order; `digest` is set after the block.

    Without `synced` a power cut may lose or damage it.
    """

    def __init__(self, path: Path, schema: Schema, *, synced: bool = True) -> None:
        self._replacing = replacing(path, synced=synced)
        self._synced = synced
        self._schema = schema
        self._sha = hashlib.sha256()
        self.digest = ""
        self.nbytes = 0

    def __enter__(self) -> WeightsWriter:
        self._file: IO[bytes] = self._replacing.__enter__()
        self._writeback = EarlyWriteback(self._file.fileno()) if self._synced else None
        self._put(header_bytes(self._schema))
        return self

    def write(self, arrays: Mapping[Part, Array]) -> None:
        """Append parts, in the order of `split_into_pieces`."""
        for part, array in arrays.items():
            dtype = DTYPES[self._schema[part.name].dtype]
            flat = np.ascontiguousarray(array, dtype).reshape(-1)
            if len(flat) != part.stop - part.start:
                raise BadWeights(f"tensor {part.name!r} has a wrong number of elements")
            self._put(flat.view(np.uint8).data)

    def write_all(self, weights: WeightReader) -> None:
        """Write all tensors of this file's schema, piece by piece."""
        for piece in split_into_pieces(self._schema):
            self.write({part: weights.read(part) for part in piece})

    def _put(self, data: bytes | memoryview) -> None:
        self._sha.update(data)
        self._file.write(data)
        if self._writeback is not None:
            self._writeback.wrote(len(data))
        self.nbytes += len(data)

    def __exit__(self, *error: Any) -> None:
        self._replacing.__exit__(*error)
        if error[0] is None:
            self.digest = self._sha.hexdigest()
