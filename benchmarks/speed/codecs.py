"""python -m benchmarks.speed.codecs [--megabytes N]: size and speed of each codec, on one core

Speed is measured for float32 input in memory: encoding (with the residual of an earlier update) and
decoding (base plus change), in CPU time, the best of a few passes. File I/O is not included.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from protocols.codecs import registry
from protocols.codecs.delta import BLOCK_ELEMENTS, DeltaReader, Floats
from protocols.codecs.dense import Encoding
from protocols.model import weights
from protocols.model.weights import DTYPES, Array, Schema, WeightReader, Weights, split_into_pieces

#: The 2NN of the FedAvg paper.
TWO_NN = {
    "1.weight": (200, 784),
    "1.bias": (200,),
    "2.weight": (200, 200),
    "2.bias": (200,),
    "3.weight": (10, 200),
    "3.bias": (10,),
}
_PASSES = 3


class _Memory:
    """Keeps an encoded file in memory, and on request the residual."""

    def __init__(self, left: bool) -> None:
        self.left: list[Floats] | None = [] if left else None
        self._parts: dict[str, list[Array]] = {}
        self._schema: Schema = {}

    def begin(self, schema: Schema) -> None:
        self._schema = schema
        self._parts = {name: [np.empty(0, DTYPES[spec.dtype])] for name, spec in schema.items()}

    def put(self, name: str, array: Array) -> None:
        self._parts[name].append(array.copy())

    def put_residual(self, residual: Floats) -> None:
        if self.left is not None:
            self.left.append(residual.copy())

    def file(self) -> Weights:
        whole = {name: np.concatenate(p) for name, p in self._parts.items()}
        return Weights(whole, weights.bf16_names(self._schema))


def run(megabytes: int = 64) -> list[dict[str, Any]]:
    """A row per codec: size ratios with headers, and GB/s."""
    rows = []
    for name in registry.NAMES[1:]:
        codec = registry.parse(name)
        assert codec.encoding is not None
        row: dict[str, Any] = {"name": codec.name}
        layers = {f"{number}.weight": (1024, 1024) for number in range(max(megabytes // 4, 1))}
        for size, shapes in (("2nn", TWO_NN), ("large", layers)):
            base, trained = _models(shapes)
            found = _measured(codec.encoding, base, trained)
            row[f"ratio_bytes_{size}"] = found.pop("ratio")
            if size == "large":
                row |= found
        rows.append(row)
    return rows


def _models(shapes: dict[str, tuple[int, ...]]) -> tuple[Weights, Weights]:
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    step = {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}
    return Weights(base), Weights({name: base[name] + step[name] for name in base})


def _measured(coding: Encoding, base: Weights, trained: Weights) -> dict[str, float]:
    first = _Memory(left=True)
    coding.encode(DeltaReader(trained, base, None, "left"), first)
    assert first.left is not None
    left = Weights({"left": np.concatenate(first.left)})
    encode_s, decode_s = [], []
    for _ in range(_PASSES):
        sink = _Memory(left=False)
        start = time.process_time()
        coding.encode(DeltaReader(trained, base, left, "left"), sink)
        encode_s.append(time.process_time() - start)
        file = sink.file()
        start = time.process_time()
        _read_all(registry.DecodedUpdate(coding, file, base))
        decode_s.append(time.process_time() - start)
    sizes = [len(weights.header_bytes(each.schema)) + each.nbytes for each in (base, file)]
    gigabytes = base.nbytes / 1e9
    return {
        "ratio": sizes[0] / sizes[1],
        "encode_gb_per_s": gigabytes / min(encode_s),
        "decode_gb_per_s": gigabytes / min(decode_s),
        "both_gb_per_s": gigabytes / (min(encode_s) + min(decode_s)),
    }


def _read_all(model: WeightReader) -> None:
    for piece in split_into_pieces(model.schema, 4 * BLOCK_ELEMENTS):
        for part in piece:
            model.read(part)


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text; the first is the header, without the column of names."""
    head = ["fewer bytes: 2NN", "large", "encode GB/s", "decode GB/s", "both GB/s"]
    return [
        head,
        *(
            [
                row["name"],
                f"{row['ratio_bytes_2nn']:.1f}×",
                f"{row['ratio_bytes_large']:.1f}×",
                f"{row['encode_gb_per_s']:.2f}",
                f"{row['decode_gb_per_s']:.2f}",
                f"{row['both_gb_per_s']:.2f}",
            ]
            for row in rows
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.codecs", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the large model")
    for line in lines(run(parser.parse_args().megabytes)):
        print("  ".join(f"{word:>16}" for word in ([""] * (6 - len(line)) + line)))


if __name__ == "__main__":
    main()
