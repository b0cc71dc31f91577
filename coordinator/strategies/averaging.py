"""Folds updates into the next version, piece by piece, through the strategy.

Updates wait on disk until the round is closed and are then summed in the order given (the run gives
name order), in float64, so the same updates give the same digest in whatever order they arrived.
Only a few pieces of the model are in memory: the peak grows with neither peers nor model. While a
piece is in the strategy, the next one is summed, and the one before is hashed and written.

A weighted mean of updates is itself an update, so the strategy gets one reply that holds the mean.
Integer and boolean tensors are not averaged: they keep the base version's value. bf16 is widened to
float32 for the sum and rounded to nearest even after.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coordinator.strategies.prefetch import prefetch
from protocols.model.weights import (
    DTYPES,
    FLOAT_DTYPES,
    PIECE_BYTES,
    Array,
    Part,
    WeightReader,
    bf16_to_float32,
    float32_to_bf16,
    split_into_pieces,
)

#: Elements that are summed at once: blocks of all updates stay in the processor's cache.
_BLOCK = 1 << 15

#: What a strategy makes of a piece of the mean: flat arrays by part, float dtypes only.
Transform = Callable[[dict[Part, Array]], dict[Part, Array]]


def shares(num_examples: Mapping[str, int], *, equal: bool, cap: float) -> dict[str, float]:
    """Each peer's share of the mean. The shares add up to 1.

    No peer's share exceeds `cap` (0…1] as long as there are enough peers for that: what is cut off
    is spread over the others in proportion, again and again until nobody is above.
    """
    raw = {peer: 1.0 if equal else float(count) for peer, count in num_examples.items()}
    total = sum(raw.values())
    share = {peer: value / total for peer, value in raw.items()}
    cap = max(cap, 1.0 / len(share))
    capped: set[str] = set()
    while over := {p for p, s in share.items() if s > cap * (1 + 1e-12) and p not in capped}:
        capped |= over
        free = sum(raw[p] for p in share if p not in capped)
        left = 1.0 - cap * len(capped)
        share = {p: cap if p in capped else left * raw[p] / free for p in share}
    return share


class RebasedUpdate:
    """Weights with the change that they make to `base`, made to `head` instead.

    All three have one schema. Integer and boolean tensors are those of `head`.
    """

    def __init__(self, weights: WeightReader, base: WeightReader, head: WeightReader) -> None:
        self.schema = head.schema
        self._weights, self._base, self._head = weights, base, head

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype."""
        dtype, to = self.schema[part.name].dtype, self._head.read(part)
        if dtype not in FLOAT_DTYPES:
            return to
        new, old, to = (
            _widened(array, dtype).astype(np.float64)
            for array in (self._weights.read(part), self._base.read(part), to)
        )
        moved = to + (new - old)
        if dtype == "BF16":
            return float32_to_bf16(moved.astype(np.float32))
        return moved.astype(DTYPES[dtype])


def average(
    updates: Sequence[WeightReader],
    share: Sequence[float],
    scale: Sequence[float],
    base: WeightReader,
    transform: Transform,
) -> Generator[dict[Part, Array], None, None]:
    """The version that follows `base`, piece by piece in file order.

    `share` adds up to 1. An update counts as `base + scale · (update - base)` (norm clipping).
    All have the base's schema: the gate saw to that.
    """
    kept = sum(part * (1.0 - by) for part, by in zip(share, scale, strict=True))
    weights = [part * by for part, by in zip(share, scale, strict=True)]

    def means() -> Generator[_Piece, None, None]:
        for piece in split_into_pieces(base.schema):
            mean: dict[Part, Array] = {}
            still: dict[Part, Array] = {}
            for part in piece:
                if base.schema[part.name].dtype in FLOAT_DTYPES:
                    mean[part] = _mean(part, updates, weights, base, kept)
                else:
                    still[part] = base.read(part)
            yield _Piece(piece, mean, still)

    # A thread costs more than a model of one piece takes.
    small = sum(spec.nbytes for spec in base.schema.values()) <= PIECE_BYTES
    for piece, mean, still in means() if small else prefetch(means()):
        new = transform(mean) if mean else {}
        yield {
            part: still[part]
            if part in still
            else _as_stored(new[part], base.schema[part.name].dtype)
            for part in piece
        }


class _Piece(NamedTuple):
    """Parts in file order; the mean of those that are averaged, the base's value of the others."""

    parts: list[Part]
    mean: dict[Part, Array]
    still: dict[Part, Array]


def _mean(
    part: Part,
    updates: Sequence[WeightReader],
    weights: Sequence[float],
    base: WeightReader,
    kept: float,
) -> Array:
    """The weighted mean of one part; float32 for bf16, else in the tensor's dtype.

    Block by block, so that what is summed stays in the processor's cache.
    """
    dtype = base.schema[part.name].dtype
    mean = np.empty(part.stop - part.start, np.float32 if dtype == "BF16" else DTYPES[dtype])
    total, term = np.empty(_BLOCK), np.empty(_BLOCK)
    terms = [*zip(updates, weights, strict=True), *([(base, kept)] if kept else [])]
    for start in range(part.start, part.stop, _BLOCK):
        block = Part(part.name, start, min(start + _BLOCK, part.stop))
        size = block.stop - block.start
        total[:size] = 0.0
        for source, weight in terms:
            np.multiply(
                _widened(source.read(block), dtype), weight, out=term[:size], dtype=np.float64
            )
            total[:size] += term[:size]
        with np.errstate(over="ignore"):  # what is infinite now is no version: the caller looks
            mean[start - part.start : block.stop - part.start] = total[:size]
    return mean


def _widened(array: Array, dtype: str) -> Array:
    return bf16_to_float32(array) if dtype == "BF16" else array


def _as_stored(array: Array, dtype: str) -> Array:
    return float32_to_bf16(array.astype(np.float32)) if dtype == "BF16" else array
