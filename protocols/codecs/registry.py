"""The codecs by name, and how to encode and decode an update as a change of its base version.

`fp32` sends the weights as they are. The others send the change of the floating-point tensors in
an encoding of `dense`, `sparse` or `chunked`. Integer and boolean tensors keep the value of the
base, as in averaging. With `sums` an update is integers that are added up (`tables.trees`), and not
weights; with `factors` it is adapters whose products count.
The agent stores what an encoding left out (the residual) and adds it to its next change
(error feedback: Seide et al. 2014; Karimireddy et al., arXiv 1901.09847).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protocols.codecs import chunked, factors
from protocols.codecs.delta import BLOCK_ELEMENTS, DeltaReader, FlatLayout, Floats, add, subtract
from protocols.codecs.dense import Bf16, Encoding, Int8, Sign
from protocols.codecs.sparse import Ternary, TopK
from protocols.errors import UnknownName, UsageError
from protocols.local.atomic_files import replacing
from protocols.model.weights import (
    FLOAT_DTYPES,
    Array,
    Part,
    Schema,
    TensorSpec,
    WeightReader,
    check_schema,
    header_bytes,
)
from protocols.model.weights_file import WeightsWriter
from protocols.tables.trees import layout

UNCODED = "fp32"
#: Not for `--codec`: a run of trees has it, and one of lora with products of adapters.
SUMS, FACTORS = "sums", "factors"
#: Before the name of the codec in the work of a run with fragments (`model.fragments`). Agents that
#: know no fragments do not know such a codec, and refuse the work before they train.
_OF_FRAGMENTS = "fragments"
NAMES = ("fp32", "bf16", "int8", "sign", "ternary", "topk", "sparse2")
#: Codecs that send few elements: the default share of elements, and the encoding.
SPARSE: dict[str, tuple[float, Callable[[float], Encoding]]] = {
    "ternary": (0.2, Ternary),
    "topk": (0.01, TopK),
}
#: Above this, int8 or sign has fewer bytes.
_MAX_SHARE = 0.25
_CHUNKED = "sparse2"
#: The default number of changes that `sparse2` sends of a chunk, and the largest.
SPARSE2_COUNT, MAX_SPARSE2_COUNT = 64, chunked.CHUNK // 4


class Codec(NamedTuple):
    """A codec by its full name; `encoding` is None for `fp32`, whose updates are sent as they are,
    and for `sums` and `factors`. `rank`: of `factors`, the largest of an update."""

    name: str
    encoding: Encoding | None
    rank: int = 0

    def base(self, version: WeightReader) -> WeightReader:
        """A version as updates are compared with it: factors as products. Raises BadWeights."""
        if self.rank and factors.is_factored(version.schema):
            return factors.Products(version)
        return version


@functools.lru_cache(16)  # each work names one
def parse(name: str) -> Codec:
    """The codec of that name: one of `NAMES`, or a sparse one with a share, such as `topk:0.02`,
    or with the changes of a chunk, such as `sparse2:128`.

    Raises UnknownName, UsageError.
    """
    if name == SUMS:
        return Codec(SUMS, None)
    kind, colon, argument = name.partition(":")
    if kind == FACTORS:
        return Codec(name, None, _parse_number(FACTORS, argument, factors.MAX_RANK))
    if kind not in NAMES or (colon and not is_sparse(kind)):
        shares = ", ".join(f"{sparse}:SHARE" for sparse in SPARSE)
        raise UnknownName(
            f"unknown codec {name!r}; known: {', '.join(NAMES)}, sparse2:COUNT, {shares}"
        )
    if kind == _CHUNKED:
        count = SPARSE2_COUNT
        if colon:
            count = _parse_number(kind, argument, MAX_SPARSE2_COUNT)
        return Codec(f"{kind}:{count}", chunked.Sparse2(count))
    if kind in SPARSE:
        default, make_encoding = SPARSE[kind]
        share = _parse_share(kind, argument) if colon else default
        return Codec(f"{kind}:{share:g}", make_encoding(share))
    dense: dict[str, Encoding] = {"bf16": Bf16(), "int8": Int8(), "sign": Sign()}
    return Codec(kind, dense.get(kind))


def name_in_work(name: str, fragments: int) -> str:
    """The text of this codec in `Work.codec`, for a run with this number of fragments."""
    return f"{_OF_FRAGMENTS}{name}" if fragments > 1 else name


def parse_in_work(name: str) -> Codec:
    """The codec that `Work.codec` names. Raises UnknownName, UsageError."""
    return parse(name.removeprefix(_OF_FRAGMENTS))


def is_sparse(name: str) -> bool:
    """True if updates with this codec leave out most elements."""
    return name.partition(":")[0] in (_CHUNKED, *SPARSE)


def _parse_number(kind: str, text: str, most: int) -> int:
    number = int(text) if re.fullmatch(r"[1-9][0-9]{0,3}", text) else 0
    if not 0 < number <= most:
        raise UsageError(
            f"{kind}:{text}: the number must be a whole one from 1 to {most}",
            f"{_CHUNKED}:{SPARSE2_COUNT} sends the {SPARSE2_COUNT} largest of each "
            f"{chunked.CHUNK} changes; above a quarter, sign takes fewer bytes",
        )
    return number


def _parse_share(kind: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= _MAX_SHARE:
        default, other = SPARSE[kind][0], {"topk": "int8", "ternary": "sign"}[kind]
        raise UsageError(
            f"{kind}:{text}: the share must be above 0 and at most {_MAX_SHARE:g}",
            f"{kind}:{default} sends the largest {default:.0%} of all changes; above a quarter, "
            f"{other} takes fewer bytes",
        )
    return share


def max_bytes(codec: Codec, schema: Schema, model_bytes: int) -> int:
    """The largest size of an update of such a model."""
    if codec.name == SUMS:
        return 4 * layout.Shape.of(schema).max_sums()
    if codec.rank:
        return factors.max_bytes(schema, codec.rank)
    if codec.encoding is None:
        return model_bytes
    largest = codec.encoding.schema(FlatLayout(schema))
    return len(header_bytes(largest)) + sum(spec.nbytes for spec in largest.values())


class Encoded(NamedTuple):
    """An encoded update: digest and size of the file."""

    digest: str
    nbytes: int


def residual_key(schema: Schema) -> str:
    """The name of the only tensor in a residual file; it identifies the model's schema."""
    return hashlib.sha256(header_bytes(schema)).hexdigest()


def residual_schema(schema: Schema) -> Schema:
    """The schema of a residual file: what the updates so far left out."""
    return {residual_key(schema): TensorSpec("F32", (FlatLayout(schema).count,))}


def encode(
    codec: Codec,
    trained: WeightReader,
    base: WeightReader,
    residual: WeightReader | None,
    out: Path,
    residual_out: Path,
) -> Encoded:
    """Write the update to `out` and its residual to `residual_out`, both durably.

    `residual`: that of the last update. Raises BadWeights (another schema, not finite), OSError.
    """
    assert codec.encoding is not None, f"{codec.name} has nothing to encode"
    check_schema(trained.schema, base.schema)
    key = residual_key(base.schema)
    with _Files(out, residual_out, residual_schema(base.schema)) as files:
        codec.encoding.encode(DeltaReader(trained, base, residual, key), files)
    return Encoded(files.coded.digest, files.coded.nbytes)


class _Files(contextlib.ExitStack):
    """The sink for an encoded file and a residual file, which are renamed if both are complete."""

    coded: WeightsWriter

    def __init__(self, out: Path, residual_out: Path, residual_schema: Schema) -> None:
        super().__init__()
        self._out = out
        self._put: dict[str, int] = {}
        self._residual = self.enter_context(replacing(residual_out))
        self._residual.write(header_bytes(residual_schema))

    def begin(self, schema: Schema) -> None:
        self.coded = self.enter_context(WeightsWriter(self._out, schema))

    def put(self, name: str, array: Array) -> None:
        start = self._put.get(name, 0)
        self._put[name] = stop = start + len(array)
        self.coded.write({Part(name, start, stop): array})

    def put_residual(self, residual: Floats) -> None:
        self._residual.write(residual.data)


class DecodedUpdate:
    """The weights after an update, read part by part from the encoded file and the base.

    Raises BadWeights unless the file has this encoding for this model.
    """

    def __init__(self, coding: Encoding, file: WeightReader, base: WeightReader) -> None:
        self.schema = base.schema
        self._base = base
        self._fields = (layout := FlatLayout(base.schema)).fields
        self._decode = coding.open(file, layout)

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        old = self._base.read(part)
        dtype = self.schema[part.name].dtype
        return add(old, self.change(part), dtype) if part.name in self._fields else old

    def change(self, part: Part) -> Floats:
        """The change of a part of a floating-point tensor, before rounding; zeros for others."""
        out = np.zeros(part.stop - part.start, np.float32)
        if part.name not in self._fields:
            return out
        for start in range(part.start, part.stop, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, part.stop)
            here = out[start - part.start : stop - part.start]
            self._decode(self._fields[part.name], start, stop, here)
        return out


class FactoredUpdate(DecodedUpdate):
    """The products of an update's factors: what it adds to a base that holds products, or puts in
    their place where `base` is made of factors (`Codec.base`). Raises BadWeights for another model.
    """

    def __init__(self, file: WeightReader, base: WeightReader, most: int) -> None:
        self.schema, self._base = base.schema, base
        self.adds = not isinstance(base, factors.Products)
        factors.check_update(file.schema, base.schema, most)
        self.products = factors.Products(file, base.schema)

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        found = self.products.read(part)
        if not self._is_added(part):
            return found
        return add(self._base.read(part), np.asarray(found, np.float32), "F32")

    def change(self, part: Part) -> Floats:
        """The change of a part of a floating-point tensor; zeros for others."""
        found, out = self.products.read(part), np.zeros(part.stop - part.start, np.float32)
        dtype = self.schema[part.name].dtype
        if self._is_added(part):
            return np.asarray(found, np.float32)
        if dtype in FLOAT_DTYPES:
            subtract(found, self._base.read(part), dtype, out)
        return out

    def _is_added(self, part: Part) -> bool:
        return self.adds and part.name.endswith(factors.DELTA)


def open_update(codec: Codec, file: WeightReader, base: WeightReader) -> WeightReader:
    """The weights of an uploaded file, which for `fp32` has the weights. Raises BadWeights."""
    if codec.rank:
        return FactoredUpdate(file, base, codec.rank)
    return file if codec.encoding is None else DecodedUpdate(codec.encoding, file, base)
