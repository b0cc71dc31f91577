"""A test that tells bytes and numbers from random ones."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def chi_squared_p(data: npt.NDArray[np.generic]) -> float:
    """The p-value of Pearson's chi-squared test over the bytes of an array."""
    return _p(np.ascontiguousarray(data).view(np.uint8))


def chi_squared_p_of_elements(data: npt.NDArray[np.unsignedinteger]) -> float:
    """The same over the elements uint[n] of a ring, in 256 intervals of equal length."""
    shift = 8 * data.itemsize - 8
    return _p((data >> data.dtype.type(shift)).astype(np.uint8))


def _p(values: npt.NDArray[np.uint8]) -> float:
    """With 255 degrees of freedom, by the approximation of Wilson and Hilferty 1931."""
    counts = np.bincount(values, minlength=256)
    expected = counts.sum() / 256
    ratio = float(((counts - expected) ** 2 / expected).sum()) / 255
    spread = 2 / (9 * 255)
    return 0.5 * math.erfc((ratio ** (1 / 3) - 1 + spread) / math.sqrt(2 * spread))
