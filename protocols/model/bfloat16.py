"""bfloat16, which numpy does not have: its bits are `uint16` arrays, its values are float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocols.model.weights import Array


def bf16_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """bf16 bits (uint16) as float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 as bf16 bits (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def widened(array: Array, dtype: str) -> Array:
    """The values of elements in a tensor's dtype: float32 for bf16, else the array itself."""
    return bf16_to_float32(array) if dtype == "BF16" else array


def as_float64(array: Array, dtype: str) -> npt.NDArray[np.float64]:
    """The values of elements in a tensor's dtype."""
    return widened(array, dtype).astype(np.float64)


def difference(new: Array, old: Array, dtype: str) -> npt.NDArray[np.float64]:
    """`new - old` of elements in a tensor's dtype."""
    return np.subtract(widened(new, dtype), widened(old, dtype), dtype=np.float64)
