"""Seeds that follow from words, and a stream of chance on which two machines agree. Pure."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*words: object) -> int:
    """32 bits that depend on every word."""
    text = " ".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def random_state(*words: object) -> np.random.RandomState:
    """Chance that depends on every word.

    Its stream is frozen for good; that of np.random.Generator may change with numpy's version, and
    then two peers would not agree who holds which example.
    """
    return np.random.RandomState(derive_seed(*words))
