"""Exponential backoff with jitter. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def delays(rng: Random, first_s: float = 0.5, max_s: float = 15.0) -> Iterator[float]:
    """Random seconds to wait before each retry, growing up to `max_s`.

    Each is drawn between `first_s` and three times the previous one ("decorrelated jitter"), so
    agents that lost their broker together do not reconnect together. None is longer than half of
    the total wait so far: a broker that is back after 4 s is found within 2 s.
    """
    last, waited = first_s, 0.0
    while True:
        longest = max(2 * first_s, min(last * 3, waited / 2))
        last = min(max_s, rng.uniform(first_s, longest))
        waited += last
        yield last
