"""The waits between tries: whoever is back after a short time is found again in a short time."""

from __future__ import annotations

from itertools import accumulate, islice
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from protocols.network.backoff import delays


@given(st.integers(0, 2**32), st.floats(0.05, 2.0), st.floats(2.0, 60.0))
def test_no_wait_is_longer_than_half_of_those_before(
    seed: int, first_s: float, most_s: float
) -> None:
    waits = list(islice(delays(Random(seed), first_s, most_s), 60))
    assert all(first_s <= wait <= most_s for wait in waits)
    for waited, following in zip(accumulate(waits), waits[1:], strict=False):
        assert following <= max(2 * first_s, waited / 2)
