"""Seeds derived from words, and random streams that are the same on all machines. Pure."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def derive_seed(*words: object) -> int:
    """A 32-bit seed that depends on every word."""
    text = " ".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def random_state(*words: object) -> np.random.RandomState:
    """A random generator whose seed depends on every word.

    numpy guarantees the stream of RandomState. That of np.random.Generator may change between
    versions, and then peers would disagree on who has which example.
    """
    return np.random.RandomState(derive_seed(*words))


def split_aside(
    count: int, part: int, share: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The places of a count of rows to train on, and one in `share` of them, to choose by."""
    order = random_state("set aside", part).permutation(count).astype(np.int64)
    aside = max(1, count // share)
    return np.sort(order[aside:]), np.sort(order[:aside])
