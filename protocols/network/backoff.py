"""How long to wait before the next try. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def delays(rng: Random, first_s: float = 0.5, max_s: float = 15.0) -> Iterator[float]:
    """Seconds to wait, one after another: growing up to `most_s`, and nowhere near in step.

    Each is drawn between `first_s` and three times the one before ("decorrelated jitter"), so a
    fleet that lost its broker in one moment does not come back in one moment. But none is longer
    than half of what was waited so far: who is back after 4 s is found again within 2.
    """
    last, waited = first_s, 0.0
    while True:
        longest = max(2 * first_s, min(last * 3, waited / 2))
        last = min(max_s, rng.uniform(first_s, longest))
        waited += last
        yield last
