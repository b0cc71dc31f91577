"""Named tensors as canonical safetensors bytes; their digest and schema. numpy only.

The canonical form is a valid safetensors file with nothing left to choose: tensors are stored in
name order without gaps, and the header is compact JSON without metadata, padded with spaces to 8
bytes. So equal weights are equal bytes, and the SHA-256 of the file, computed while it streams, is
the digest that names the version.

numpy has no bf16 type: such tensors are `uint16` arrays here, and the schema has their dtype.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.local.atomic_files import replacing
from protocols.local.early_writeback import EarlyWriteback

Array = npt.NDArray[np.generic]
Buffer = bytes | memoryview | mmap.mmap

MAX_HEADER_BYTES = 8 * 1024 * 1024
#: Headers that are not read again for the next file of the same model.
MAX_KEPT_HEADER_BYTES = 64 * 1024
PIECE_BYTES = 4 * 1024 * 1024
#: Limits of numpy in every version that we support.
MAX_DIMENSIONS = 32
MAX_TENSOR_BYTES = 2**62

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items() if code != "BF16"}

#: dtypes whose tensors are averaged; all others keep their value.
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


class TensorSpec(NamedTuple):
    """Shape and dtype code of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Schema = dict[str, TensorSpec]


class Part(NamedTuple):
    """Elements `start` to `stop` of one flattened tensor."""

    name: str
    start: int
    stop: int


class WeightReader(Protocol):
    """Weights that can be read part by part, in memory or in a file."""

    schema: Schema

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        ...


class Weights(Mapping[str, Array]):
    """Named tensors with their schema, in name order.

    `bf16` names the tensors whose `uint16` data are bfloat16 bits.
    """

    def __init__(self, tensors: Mapping[str, Array], bf16: Iterable[str] = ()) -> None:
        bf16 = frozenset(bf16)
        self._tensors = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
        self.schema: Schema = {}
        for name, array in self._tensors.items():
            code = "BF16" if name in bf16 else _CODES.get(array.dtype.newbyteorder("<"))
            if code is None:
                raise BadWeights(f"tensor {name!r} has the unsupported dtype {array.dtype}")
            self.schema[name] = TensorSpec(code, array.shape)

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, part: Part) -> Array:
        """The elements of a part, flat."""
        return self._tensors[part.name].reshape(-1)[part.start : part.stop]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(spec.nbytes for spec in self.schema.values())


def bf16_names(schema: Schema) -> list[str]:
    """The tensors of a schema whose `uint16` data are bfloat16 bits."""
    return [name for name, spec in schema.items() if spec.dtype == "BF16"]


def header_bytes(schema: Schema) -> bytes:
    """The canonical header: 8 bytes of length, then compact JSON padded to 8 bytes."""
    table: dict[str, object] = {}
    offset = 0
    for name in sorted(schema):
        spec = schema[name]
        table[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def chunks(weights: Weights) -> Iterator[bytes | memoryview]:
    """The canonical bytes of `weights` without copies: the header, then one chunk per tensor."""
    yield header_bytes(weights.schema)
    for name, spec in weights.schema.items():
        array = np.ascontiguousarray(weights[name], dtype=DTYPES[spec.dtype])
        yield array.reshape(-1).view(np.uint8).data


def to_bytes(weights: Weights) -> bytes:
    """The canonical bytes of small weights. For large weights use `save`."""
    return b"".join(chunks(weights))


def digest(weights: Weights) -> str:
    """SHA-256 (hex) of the canonical bytes."""
    sha = hashlib.sha256()
    for piece in chunks(weights):
        sha.update(piece)
    return sha.hexdigest()


def save(weights: Weights, path: Path, *, synced: bool = True) -> str:
    """Write the canonical file atomically; return its digest.

    Not `synced`: a power cut may leave a damaged file, so sync it later or check its digest.
    """
    sha = hashlib.sha256()
    with replacing(path, synced=synced) as file:
        writeback = EarlyWriteback(file.fileno()) if synced else None
        for chunk in chunks(weights):
            for start in range(0, len(chunk), PIECE_BYTES):
                piece = memoryview(chunk)[start : start + PIECE_BYTES]
                sha.update(piece)
                file.write(piece)
                if writeback is not None:
                    writeback.wrote(len(piece))
    return sha.hexdigest()


def read_schema(data: Buffer) -> tuple[Schema, int]:
    """The schema of canonical bytes, and the offset of the tensors. Raises BadWeights."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadWeights(f"a header of {length} bytes in a file of {len(data)} bytes")
    return check_header(bytes(data[: 8 + length]), len(data))


def check_header(head: bytes, size: int) -> tuple[Schema, int]:
    """The schema of a canonical file of `size` bytes, and the offset of the tensors.

    `head`: the first bytes of the file, the length of the header and the header. Raises BadWeights.
    """
    if len(head) < 8:
        raise BadWeights("shorter than a safetensors header")
    length = int.from_bytes(head[:8], "little")
    if len(head) != 8 + length:
        raise BadWeights(f"a header of {length} bytes in a file of {size} bytes")
    read = _read_header if len(head) <= MAX_KEPT_HEADER_BYTES else _read_header.__wrapped__
    schema, expected = read(head)
    if size != expected:
        raise BadWeights(f"the file has {size} bytes, but its header says {expected}")
    return dict(schema), len(head)


@functools.lru_cache(4)
def _read_header(head: bytes) -> tuple[Schema, int]:
    """The schema and the size of the file. Raises BadWeights."""
    try:
        table = json.loads(head[8:])
    except (ValueError, RecursionError) as err:
        raise BadWeights(f"the header is not JSON: {err}") from err
    schema = parse_header(table)
    try:
        canonical = header_bytes(schema)
    except UnicodeEncodeError as err:  # a lone surrogate, which JSON can spell
        raise BadWeights("a tensor's name is not valid text") from err
    if canonical != head:
        raise BadWeights("the header is not in canonical form")
    return schema, len(head) + sum(spec.nbytes for spec in schema.values())


def parse_header(table: object) -> Schema:
    """The schema in the JSON of a header. Raises BadWeights."""
    if not isinstance(table, dict):
        raise BadWeights("the header is not a table of tensors")
    schema: Schema = {}
    for name, entry in table.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise BadWeights(f"tensor {name!r} has dtype {str(dtype)[:20]!r}; supported: {known}")
        if not _is_valid_shape(entry.get("shape"), DTYPES[dtype].itemsize):
            raise BadWeights(f"tensor {name!r} has no valid shape")
        schema[name] = TensorSpec(dtype, tuple(entry["shape"]))
    return schema


def _is_valid_shape(shape: object, itemsize: int) -> bool:
    """True for a shape that numpy supports, also if one side is 0."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        return False
    nbytes = itemsize
    for side in shape:
        if type(side) is not int or not 0 <= side < 2**40:
            return False
        nbytes *= max(side, 1)
    return nbytes <= MAX_TENSOR_BYTES


def from_bytes(data: Buffer) -> Weights:
    """Weights that are views of `data`. Raises BadWeights."""
    schema, offset = read_schema(data)
    offsets = {}
    for name, spec in schema.items():
        offsets[name] = offset
        offset += spec.nbytes
    return view(data, schema, offsets)


def view(data: Buffer, schema: Schema, offsets: Mapping[str, int]) -> Weights:
    """Weights that are views of `data`, each at its offset."""
    tensors: dict[str, Array] = {}
    for name, (dtype, shape) in schema.items():
        array = np.frombuffer(data, DTYPES[dtype], math.prod(shape), offsets[name])
        tensors[name] = array.reshape(shape)
    return Weights(tensors, bf16_names(schema))


def load(path: Path) -> Weights:
    """Weights that are views of a read-only memory map of the file. Raises BadWeights, OSError."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise BadWeights(f"{path.name} is empty")
        return from_bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_schema(found: Schema, expected: Schema) -> None:
    """Raise BadWeights with the first tensor in which `found` differs from `expected`."""
    for name, spec in expected.items():
        if name not in found:
            raise BadWeights(f"tensor {name!r} is missing")
        if found[name] != spec:
            raise BadWeights(
                f"tensor {name!r} is {found[name].dtype}{list(found[name].shape)}, "
                f"expected {spec.dtype}{list(spec.shape)}"
            )
    if extra := sorted(found.keys() - expected.keys()):
        raise BadWeights(f"tensor {extra[0]!r} is not part of the model")


def check_finite(weights: WeightReader) -> None:
    """Raise BadWeights with the first tensor that contains NaN or infinity."""
    for piece in split_into_pieces(weights.schema):
        for part in piece:
            if not is_finite(weights.read(part), weights.schema[part.name].dtype):
                raise BadWeights(f"tensor {part.name!r} contains NaN or infinity")


def is_finite(array: Array, dtype: str) -> bool:
    """True unless the array contains NaN or infinity; always True for integers."""
    if dtype not in FLOAT_DTYPES:
        return True
    if dtype == "BF16":  # all bits of the exponent are set in infinity and NaN
        return not bool(((array.astype(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array).all())


def split_into_pieces(schema: Schema, limit_bytes: int = PIECE_BYTES) -> Iterator[list[Part]]:
    """All parts of a model in file order, in groups of about `limit_bytes`.

    Large tensors are split, small ones are grouped. Tensors without elements are left out.
    """
    group: list[Part] = []
    room = limit_bytes
    for name in sorted(schema):
        itemsize = DTYPES[schema[name].dtype].itemsize
        start, count = 0, schema[name].nbytes // itemsize
        while start < count:
            stop = min(count, start + max(1, room // itemsize))
            group.append(Part(name, start, stop))
            room -= (stop - start) * itemsize
            start = stop
            if room < itemsize:
                yield group
                group, room = [], limit_bytes
    if group:
        yield group
