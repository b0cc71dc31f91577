"""Weights by which all classes of a target count alike, however rare one is. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

#: The option that gives all classes one weight.
BALANCED = "--set class_weights=balanced"
#: A class is rare if it has less than this part of the rows that each class would have alike.
_RARE_PART = 0.2
#: The largest weight of a class.
MAX_WEIGHT = 1e6


def balanced(classes: Sequence[str], counts: Mapping[str, int]) -> tuple[tuple[float, ...], float]:
    """The weight of each class, n / (k · n_c) as in scikit-learn, and a bound on those of all rows
    together, a power of 2."""
    total = sum(counts.values())
    weights = [total / (len(counts) * counts[name]) for name in classes]
    rounded = tuple(float(f"{min(weight, MAX_WEIGHT):.6g}") for weight in weights)
    return rounded, 2.0 ** math.ceil(math.log2(total + 1))


def of_told_rows(
    weights: Sequence[float], classes: npt.NDArray[np.int64], min_rows: int
) -> npt.NDArray[np.float64]:
    """The weight of each class in a loss that leaves this machine, over rows of these classes.

    From losses with different weights, the loss of each class could be computed. So a class with
    fewer than `min_rows` rows has the weight of the most frequent one: only their sum is known.
    """
    counts, found = np.bincount(classes, minlength=len(weights)), np.array(weights)
    return np.where(counts < min_rows, found[counts.argmax()], found)


def rare_class_hint(counts: Mapping[str, int]) -> str:
    """Which of these classes is rare; empty if none is."""
    name, least = min(counts.items(), key=lambda pair: (pair[1], pair[0]), default=("", 0))
    total = sum(counts.values())
    if least * len(counts) >= _RARE_PART * total:
        return ""
    return f"the class {name!r} has {least / total:.1%} of the rows"
