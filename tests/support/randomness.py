"""A test that tells bytes from random ones."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def chi_squared_p(data: npt.NDArray[np.generic]) -> float:
    """The p-value of Pearson's chi-squared test over the bytes of an array.

    With 255 degrees of freedom, by the approximation of Wilson and Hilferty 1931.
    """
    counts = np.bincount(np.ascontiguousarray(data).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    ratio = float(((counts - expected) ** 2 / expected).sum()) / 255
    spread = 2 / (9 * 255)
    return 0.5 * math.erfc((ratio ** (1 / 3) - 1 + spread) / math.sqrt(2 * spread))
