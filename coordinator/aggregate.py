"""The weighted mean of updates, tensor by tensor from memory maps.

Only one tensor is held in float64 at a time, so memory does not grow with the peers or the model.
Updates are summed in the order given (the run gives name order), so the same updates give the same
digest in whatever order they arrived. Integer and boolean tensors are not averaged: they keep the
base version's value. bf16 is widened to float32 for the sum and rounded to nearest even after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from protocols.weights import FLOATING, Array, Weights


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


def weighted_mean(
    updates: Sequence[Weights],
    share: Sequence[float],
    base: Weights,
    scale: Sequence[float] | None = None,
) -> Weights:
    """The mean of `updates` weighted by `share` (adds up to 1), in the base's dtypes.

    With `scale` (0…1 each) an update counts as `base + scale · (update - base)`: norm clipping.
    All must have the base's schema: the gate saw to that.
    """
    result: dict[str, Array] = {}
    bf16 = [name for name, spec in base.schema.items() if spec.dtype == "BF16"]
    scale = scale or [1.0] * len(updates)
    kept = sum(part * (1.0 - by) for part, by in zip(share, scale, strict=True))
    for name, spec in base.schema.items():
        if spec.dtype not in FLOATING:
            result[name] = base[name]
            continue
        read = widen if spec.dtype == "BF16" else _as_is
        total = np.zeros(spec.shape, np.float64)
        for update, part, by in zip(updates, share, scale, strict=True):
            total += np.multiply(read(update[name]), part * by, dtype=np.float64)
        if kept:
            total += np.multiply(read(base[name]), kept, dtype=np.float64)
        if spec.dtype == "BF16":
            result[name] = _narrow(total.astype(np.float32))
        else:
            result[name] = total.astype(base[name].dtype)
    return Weights(result, bf16)


def _as_is(array: Array) -> Array:
    return array


def widen(bits: Array) -> Array:
    """bf16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Array) -> Array:
    """float32 as bf16 bits (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)
