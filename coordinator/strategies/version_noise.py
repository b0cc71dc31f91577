"""Gaussian noise for a version that is the same whenever its round is closed again.

AES-256 in counter mode expands a key of the round. Each number depends on the key, the tensor's
name and its place alone, so pieces may be made in any order. Noise is added in float64 and then
rounded to the tensor's dtype, which hides the last bits of the floats (Mironov 2012).
"""

from __future__ import annotations

import hashlib
import hmac
import math

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.model.bfloat16 import difference
from protocols.model.weights import (
    FLOAT_DTYPES,
    Part,
    WeightReader,
    split_into_pieces,
)

#: Numbers that are made from one block of AES, a pair of 64 bits.
_PER_BLOCK = 2


class VersionNoise:
    """Normal numbers of the standard deviation `deviation`, from `key` (32 bytes)."""

    def __init__(self, key: bytes, deviation: float) -> None:
        self._key, self._deviation = key, deviation

    def of(self, part: Part) -> npt.NDArray[np.float64]:
        """float64[n]: the noise of the elements of a part."""
        first = part.start // _PER_BLOCK
        pairs = -(-part.stop // _PER_BLOCK) - first
        key = hmac.digest(self._key, part.name.encode(), hashlib.sha256)
        cipher = Cipher(algorithms.AES(key), modes.CTR(first.to_bytes(16, "big")))
        stream = cipher.encryptor().update(bytes(16 * pairs))
        bits = np.frombuffer(stream, np.dtype("<u8")).reshape(pairs, 2) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
        # Box and Muller 1958
        radius = self._deviation * np.sqrt(-2.0 * np.log(uniform[:, 0]))
        angle = (2.0 * math.pi) * uniform[:, 1]
        normal = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)
        skipped = part.start - first * _PER_BLOCK
        return normal[skipped : skipped + part.stop - part.start]


def norm_as_folded(update: WeightReader, base: WeightReader) -> float:
    """The Euclidean norm of an update's change, of the values that are summed, in float64.

    Not the norm as it was sent: rounding to a narrow dtype can make a change larger.
    """
    total = 0.0
    for piece in split_into_pieces(base.schema):
        for part in piece:
            dtype = base.schema[part.name].dtype
            if dtype in FLOAT_DTYPES:
                change = difference(update.read(part), base.read(part), dtype)
                total += float(np.einsum("i,i->", change, change))
    return math.sqrt(total)
