"""Unpredictable noise and samples: AES-256 expands random bytes of the operating system.

torch's generator on the CPU reduces its seed to 32 bits, so an attacker who knows the rest could
try all seeds. The coordinator knows the seed of a run. Noise is drawn and added in float64, then
rounded to float32, which hides the last bits of the floats (Mironov 2012).
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floats = npt.NDArray[np.float64]


class SecretNoise:
    """A stream of numbers with a key of its own; never the same twice."""

    def __init__(self) -> None:
        key, start = secrets.token_bytes(32), secrets.token_bytes(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(start)).encryptor()

    def uniforms(self, count: int) -> Floats:
        """float64[count] in (0, 1), of 53 bits."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64) >> np.uint64(11)
        return (bits.astype(np.float64) + 0.5) * 2.0**-53

    def normals(self, count: int) -> Floats:
        """float64[count] of the normal distribution (Box and Muller 1958)."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniforms(half)))
        angle = (2.0 * math.pi) * self.uniforms(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def sample(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """The places of a Poisson sample of `count` rows: each is in it with probability `rate`."""
        if rate >= 1:
            return np.arange(count)
        return np.flatnonzero(self.uniforms(count) < rate)
