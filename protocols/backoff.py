"""How long to wait before the next try. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def delays(rng: Random, first_s: float = 0.5, most_s: float = 15.0) -> Iterator[float]:
    """Seconds to wait, one after another: growing up to `most_s`, and nowhere near in step.

    Each is drawn between `first_s` and three times the one before ("decorrelated jitter"), so a
    fleet that lost its broker in one moment does not come back in one moment.
    """
    last = first_s
    while True:
        last = min(most_s, rng.uniform(first_s, last * 3))
        yield last
