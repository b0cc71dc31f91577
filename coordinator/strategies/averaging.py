"""Averages updates into the next version, piece by piece, through the strategy.

Updates stay on disk until the round closes. They are then summed in the given order (the run sorts
them by peer), in float64, so the same updates give the same digest whatever their order of arrival.
Only a few pieces of the model are in memory, so the peak depends on neither peers nor model size.
While the strategy has a piece, the next one is summed, and the previous one is hashed and written.

A weighted mean of updates is itself an update, so the strategy gets one reply with the mean.
Integer and boolean tensors are not averaged: they keep the base's values. bf16 is converted to
float32 for the sum, and the result is rounded to nearest even.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.strategies.prefetch import prefetch
from protocols.model.bfloat16 import as_float64, float32_to_bf16, widened
from protocols.model.weights import (
    DTYPES,
    FLOAT_DTYPES,
    PIECE_BYTES,
    Array,
    Part,
    WeightReader,
    split_into_pieces,
)

#: Elements that are summed at once, so that the blocks of all updates stay in the CPU cache.
_BLOCK = 1 << 15

#: The strategy's function of a piece of the mean: flat arrays by part, float dtypes only.
Transform = Callable[[dict[Part, Array]], dict[Part, Array]]
#: Noise for the mean of a part: float64[n], the same at each call.
Noise = Callable[[Part], npt.NDArray[np.float64]]


def shares(num_examples: Mapping[str, float], *, cap: float) -> dict[str, float]:
    """Each peer's share of the mean. The shares add up to 1.

    No peer's share exceeds `cap` (0…1] if there are enough peers for that. The excess is
    distributed over the others in proportion, until none is above.
    """
    raw = {peer: float(count) for peer, count in num_examples.items()}
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


def shares_by_ticket(
    num_examples: Mapping[str, float], ticket_of: Callable[[str], str], *, cap: float
) -> dict[str, float]:
    """As `shares`, and the peers that joined by one ticket have at most `cap` together.

    Otherwise somebody with a ticket for several machines could multiply their share. With peers
    of one ticket only, the cap holds for each peer.
    """
    share = shares(num_examples, cap=cap)
    tickets = {peer: ticket_of(peer) for peer in share}
    counts: dict[str, float] = defaultdict(float)
    together: dict[str, float] = defaultdict(float)
    for peer, part in share.items():
        counts[tickets[peer]] += num_examples[peer]
        together[tickets[peer]] += part
    if len(together) == 1 or max(together.values()) <= cap * (1 + 1e-12):
        return share
    allowed = shares(counts, cap=cap)
    return {
        peer: allowed[tickets[peer]] * (part / together[tickets[peer]])
        for peer, part in share.items()
    }


class RebasedUpdate:
    """The change from `base` to `weights`, applied to `head`.

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
            as_float64(array, dtype)
            for array in (self._weights.read(part), self._base.read(part), to)
        )
        return as_stored(to + (new - old), dtype)


def average(
    updates: Sequence[WeightReader],
    share: Sequence[float],
    scale: Sequence[float],
    base: WeightReader,
    transform: Transform,
    noise: Noise | None = None,
) -> Generator[dict[Part, Array], None, None]:
    """The version that follows `base`, piece by piece in file order.

    `share` adds up to 1. An update counts as `base + scale · (update - base)` (norm clipping).
    Validation has checked that all updates have the base's schema.
    """
    base_weight = sum(part * (1.0 - by) for part, by in zip(share, scale, strict=True))
    weights = [part * by for part, by in zip(share, scale, strict=True)]

    def means() -> Generator[_Piece, None, None]:
        for piece in split_into_pieces(base.schema):
            mean: dict[Part, Array] = {}
            unchanged: dict[Part, Array] = {}
            for part in piece:
                if base.schema[part.name].dtype in FLOAT_DTYPES:
                    mean[part] = mean_of(part, updates, weights, base, base_weight, noise)
                else:
                    unchanged[part] = base.read(part)
            yield _Piece(piece, mean, unchanged)

    # For a model of one piece, a thread costs more than it saves.
    small = sum(spec.nbytes for spec in base.schema.values()) <= PIECE_BYTES
    for piece, mean, unchanged in means() if small else prefetch(means()):
        new = transform(mean) if mean else {}
        yield {
            part: unchanged[part]
            if part in unchanged
            else as_stored(new[part], base.schema[part.name].dtype)
            for part in piece
        }


class _Piece(NamedTuple):
    """Parts in file order: the mean of those that are averaged, the base's values of the others."""

    parts: list[Part]
    mean: dict[Part, Array]
    unchanged: dict[Part, Array]


def mean_of(
    part: Part,
    updates: Sequence[WeightReader],
    weights: Sequence[float],
    base: WeightReader,
    base_weight: float,
    noise: Noise | None = None,
) -> Array:
    """The weighted mean of one part, as float32 for bf16, else in the tensor's dtype.

    It is summed block by block, to stay in the CPU cache.
    """
    dtype = base.schema[part.name].dtype
    mean = np.empty(part.stop - part.start, np.float32 if dtype == "BF16" else DTYPES[dtype])
    total, term = np.empty(_BLOCK), np.empty(_BLOCK)
    terms = [*zip(updates, weights, strict=True), *([(base, base_weight)] if base_weight else [])]
    for start in range(part.start, part.stop, _BLOCK):
        block = Part(part.name, start, min(start + _BLOCK, part.stop))
        size = block.stop - block.start
        total[:size] = 0.0
        for source, weight in terms:
            np.multiply(
                widened(source.read(block), dtype), weight, out=term[:size], dtype=np.float64
            )
            total[:size] += term[:size]
        if noise is not None:
            total[:size] += noise(block)
        with np.errstate(over="ignore"):  # the caller rejects infinite values
            mean[start - part.start : block.stop - part.start] = total[:size]
    return mean


def as_stored(array: Array, dtype: str) -> Array:
    """Values in the dtype of their tensor: infinite where it is too narrow for them."""
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            return float32_to_bf16(array.astype(np.float32, copy=False))
        return array.astype(DTYPES[dtype], copy=False)
