"""Codecs: an update as a change of its base version in few bytes, and back. Pure numpy.

`fp32` is no codec: the weights travel whole, as they are. The others send what training changed in
the floating-point tensors, after `codings`; integers and booleans keep the base's value, which the
aggregation gives them anyway. What a codec leaves out is kept by the agent and added to the next
change (error feedback: Seide et al. 2014; Karimireddy et al., arXiv 1901.09847), so over time all
of it arrives.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protocols.codecs.delta import BLOCK_ELEMENTS, DeltaReader, FlatLayout, Floats, add
from protocols.codecs.dense import Bf16, Encoding, Int8, Sign
from protocols.codecs.sparse import Ternary, TopK
from protocols.errors import UnknownName, UsageError
from protocols.local.atomic_files import replacing
from protocols.model.weights import (
    Array,
    Part,
    Schema,
    TensorSpec,
    WeightReader,
    check_schema,
    header_bytes,
)
from protocols.model.weights_file import WeightsWriter

UNCODED = "fp32"
NAMES = ("fp32", "bf16", "int8", "sign", "ternary", "topk")
#: Those that send few elements, how large a share of them, and with what.
SPARSE: dict[str, tuple[float, Callable[[float], Encoding]]] = {
    "ternary": (0.2, Ternary),
    "topk": (0.01, TopK),
}
#: Above this, int8 or sign has fewer bytes.
_MOST_SHARE = 0.25


class Codec(NamedTuple):
    """A codec by its full name; `coding` is None for `fp32`."""

    name: str
    encoding: Encoding | None


def parse(name: str) -> Codec:
    """The codec that `name` means: one of `NAMES`, or a sparse one with its share: `topk:0.02`.

    Raises UnknownName, UsageError.
    """
    kind, colon, argument = name.partition(":")
    if kind not in NAMES or (colon and kind not in SPARSE):
        shares = ", ".join(f"{sparse}:SHARE" for sparse in SPARSE)
        raise UnknownName(f"unknown codec {name!r}; known: {', '.join(NAMES)}, {shares}")
    if kind in SPARSE:
        default, coding = SPARSE[kind]
        share = _share(kind, argument) if colon else default
        return Codec(f"{kind}:{share:g}", coding(share))
    codings: dict[str, Encoding] = {"bf16": Bf16(), "int8": Int8(), "sign": Sign()}
    return Codec(kind, codings.get(kind))


def is_sparse(name: str) -> bool:
    """True if such updates say nothing of most elements."""
    return name.partition(":")[0] in SPARSE


def _share(kind: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= _MOST_SHARE:
        other = {"topk": "int8", "ternary": "sign"}[kind]
        raise UsageError(
            f"{kind}:{text}: the share is above 0 and at most {_MOST_SHARE:g}",
            f"{kind}:{SPARSE[kind][0]} sends the largest {SPARSE[kind][0]:.0%}; above a quarter "
            f"{other} has fewer bytes",
        )
    return share


def max_bytes(codec: Codec, schema: Schema, model_bytes: int) -> int:
    """The largest file that an update of such a model can be."""
    if codec.encoding is None:
        return model_bytes
    coded = codec.encoding.schema(FlatLayout(schema))
    return len(header_bytes(coded)) + sum(spec.nbytes for spec in coded.values())


class Encoded(NamedTuple):
    """A written update: digest and size of the file."""

    digest: str
    nbytes: int


def residual_key(schema: Schema) -> str:
    """The name of the one tensor in a file of leftovers: which models it is for."""
    return hashlib.sha256(header_bytes(schema)).hexdigest()


def residual_schema(schema: Schema) -> Schema:
    """The schema of a file of leftovers: what the updates so far did not say."""
    return {residual_key(schema): TensorSpec("F32", (FlatLayout(schema).count,))}


def encode(
    codec: Codec,
    trained: WeightReader,
    base: WeightReader,
    residual: WeightReader | None,
    out: Path,
    residual_out: Path,
) -> Encoded:
    """Write the update to `out`, and to `left_out` what it leaves over; both durably.

    `left` is what was left over before. Raises BadWeights (another schema, not finite), OSError.
    """
    assert codec.encoding is not None, f"{codec.name} has nothing to encode"
    check_schema(trained.schema, base.schema)
    key = residual_key(base.schema)
    with _Files(out, residual_out, residual_schema(base.schema)) as files:
        codec.encoding.encode(DeltaReader(trained, base, residual, key), files)
    return Encoded(files.coded.digest, files.coded.nbytes)


class _Files(contextlib.ExitStack):
    """A coded file and a file of leftovers, which both take their place only when all went well."""

    coded: WeightsWriter

    def __init__(self, out: Path, left_out: Path, left_schema: Schema) -> None:
        super().__init__()
        self._out = out
        self._put: dict[str, int] = {}
        self._left = self.enter_context(replacing(left_out))
        self._left.write(header_bytes(left_schema))

    def begin(self, schema: Schema) -> None:
        self.coded = self.enter_context(WeightsWriter(self._out, schema))

    def put(self, name: str, array: Array) -> None:
        start = self._put.get(name, 0)
        self._put[name] = stop = start + len(array)
        self.coded.write({Part(name, start, stop): array})

    def put_residual(self, left: Floats) -> None:
        self._left.write(left.data)


class DecodedUpdate:
    """The weights that an update amounts to, read part by part from the coded file and the base.

    Raises BadWeights unless the file is one of this codec for this model.
    """

    def __init__(self, coding: Encoding, file: WeightReader, base: WeightReader) -> None:
        self.schema = base.schema
        self._base = base
        self._fields = (layout := FlatLayout(base.schema)).fields
        self._coded = coding.open(file, layout)

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        old = self._base.read(part)
        dtype = self.schema[part.name].dtype
        return add(old, self.change(part), dtype) if part.name in self._fields else old

    def change(self, part: Part) -> Floats:
        """What the update adds to a part of a floating-point tensor, before it is rounded."""
        if part.name not in self._fields:
            return np.zeros(part.stop - part.start, np.float32)
        out = np.empty(part.stop - part.start, np.float32)
        for start in range(part.start, part.stop, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, part.stop)
            here = out[start - part.start : stop - part.start]
            self._coded.change(self._fields[part.name], start, stop, here)
        return out


def open_update(codec: Codec, file: WeightReader, base: WeightReader) -> WeightReader:
    """The weights in an uploaded file, which for `fp32` are the file's own. Raises BadWeights."""
    return file if codec.encoding is None else DecodedUpdate(codec.encoding, file, base)
