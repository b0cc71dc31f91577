"""Secret sharing over a prime field (Shamir 1979), for secrets of 32 bytes. Pure.

The arithmetic uses Python integers, so its time depends on their values. This is
acceptable, because no other machine can measure it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

#: A prime just above 2^256.
PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(
    secret: bytes, threshold: int, places: Iterable[int], draw: Callable[[], int]
) -> list[bytes]:
    """One share (33 bytes) for each place (at least 1); any `threshold` of them give the secret.

    `draw` returns a uniform integer below PRIME for each further coefficient.
    """
    coefficients = [int.from_bytes(secret, "big"), *(draw() for _ in range(threshold - 1))]
    shares = []
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def lagrange(places: Sequence[int]) -> list[int]:
    """The factors with which shares at these places add up to the secret."""
    factors = []
    for one in places:
        above = below = 1
        for other in places:
            if other != one:
                above = above * other % PRIME
                below = below * (other - one) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors


def combine(shares: Sequence[bytes], factors: Sequence[int]) -> bytes | None:
    """The secret (32 bytes), or None if the shares are not those of any secret."""
    values = [int.from_bytes(share, "big") for share in shares]
    secret = sum(a * b for a, b in zip(values, factors, strict=True)) % PRIME
    return secret.to_bytes(SECRET_BYTES, "big") if secret < 2**256 else None
