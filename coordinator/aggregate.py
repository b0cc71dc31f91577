"""Folds updates into the next version, piece by piece, through the strategy.

Updates wait on disk until the round is closed and are then summed in the order given (the run gives
name order), in float64, so the same updates give the same digest in whatever order they arrived.
Only one piece of the model is in memory at a time: the peak grows with neither peers nor model.

A weighted mean of updates is itself an update, so the strategy gets one reply that holds the mean.
Integer and boolean tensors are not averaged: they keep the base version's value. bf16 is widened to
float32 for the sum and rounded to nearest even after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from protocols.weights import DTYPES, FLOATING, Array, Part, Readable, Weights, pieces

#: What a strategy makes of a piece of the mean: flat arrays by part, float dtypes only.
Through = Callable[[dict[Part, Array]], dict[Part, Array]]


def shares(num_examples: Mapping[str, int], *, equal: bool, cap: float) -> dict[str, float]:
    """Each peer's share of the mean; they add up to 1.

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


class Moved:
    """Weights with the change that they make to `base`, made to `head` instead.

    All three have one schema. Integer and boolean tensors are those of `head`.
    """

    def __init__(self, weights: Readable, base: Readable, head: Readable) -> None:
        self.schema = head.schema
        self._weights, self._base, self._head = weights, base, head

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype."""
        dtype, to = self.schema[part.name].dtype, self._head.read(part)
        if dtype not in FLOATING:
            return to
        new, old, to = (
            _floats(array, dtype).astype(np.float64)
            for array in (self._weights.read(part), self._base.read(part), to)
        )
        moved = to + (new - old)
        if dtype == "BF16":
            return narrow(moved.astype(np.float32))
        return moved.astype(DTYPES[dtype])


def fold(
    updates: Sequence[Readable],
    share: Sequence[float],
    scale: Sequence[float],
    base: Readable,
    through: Through,
) -> Iterator[dict[Part, Array]]:
    """The version that follows `base`, piece by piece in file order.

    `share` adds up to 1. An update counts as `base + scale · (update - base)` (norm clipping).
    All have the base's schema: the gate saw to that.
    """
    kept = sum(part * (1.0 - by) for part, by in zip(share, scale, strict=True))
    weights = [part * by for part, by in zip(share, scale, strict=True)]
    for piece in pieces(base.schema):
        mean: dict[Part, Array] = {}
        for part in piece:
            if base.schema[part.name].dtype in FLOATING:
                mean[part] = _mean(part, updates, weights, base, kept)
        new = through(mean) if mean else {}
        yield {
            part: _as_stored(new[part], base.schema[part.name].dtype)
            if part in mean
            else base.read(part)
            for part in piece
        }


def weighted_mean(
    updates: Sequence[Weights],
    share: Sequence[float],
    base: Weights,
    scale: Sequence[float] | None = None,
) -> Weights:
    """The mean of small models in memory: `fold` with nothing in between."""
    flat = {name: np.array(base[name]).reshape(-1) for name in base}
    for piece in fold(updates, share, scale or [1.0] * len(updates), base, lambda mean: mean):
        for part, array in piece.items():
            flat[part.name][part.start : part.stop] = array
    bf16 = [name for name, spec in base.schema.items() if spec.dtype == "BF16"]
    return Weights({n: array.reshape(base.schema[n].shape) for n, array in flat.items()}, bf16)


def _mean(
    part: Part, updates: Sequence[Readable], weights: Sequence[float], base: Readable, kept: float
) -> Array:
    """The weighted mean of one part; float32 for bf16, else in the tensor's dtype."""
    dtype = base.schema[part.name].dtype
    total = np.zeros(part.stop - part.start, np.float64)
    term = np.empty_like(total)
    for update, weight in zip(updates, weights, strict=True):
        np.multiply(_floats(update.read(part), dtype), weight, out=term, dtype=np.float64)
        total += term
    if kept:
        np.multiply(_floats(base.read(part), dtype), kept, out=term, dtype=np.float64)
        total += term
    return total.astype(np.float32 if dtype == "BF16" else DTYPES[dtype])


def _floats(array: Array, dtype: str) -> Array:
    return widen(array) if dtype == "BF16" else array


def _as_stored(array: Array, dtype: str) -> Array:
    return narrow(array.astype(np.float32)) if dtype == "BF16" else array


def widen(bits: Array) -> Array:
    """bf16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 as bf16 bits (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)
