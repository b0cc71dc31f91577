"""A coordinator whose plan of a sum, or whose work, makes the update of one peer readable in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protocols.privacy.secagg import ring
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import ShareRequest, encode
from tests.support.secure_desks import Room

pytestmark = pytest.mark.attack("secure", by="coordinator")

#: With these weights, a sum of numbers that are each -1, 0 or 1 has these as its digits.
_WEIGHTS = (1, 3, 9)


def digits(total: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The three numbers that are each -1, 0 or 1, and whose sum with `_WEIGHTS` is `total`."""
    found = []
    for _ in _WEIGHTS:
        digit = (total + 1) % 3 - 1
        found.append(digit)
        total = (total - digit) // 3
    return found


def alike(one: Any, other: Any) -> float:
    """The correlation of two arrays; 0 if one is constant."""
    if not (np.std(one) and np.std(other)):
        return 0.0
    return abs(float(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]))


def test_the_weights_of_a_sum_do_not_tell_its_parts() -> None:
    """Attack: set limits that round each element to -1, 0 or 1, and take the sum apart by weights.

    Each part would be an unbiased estimate of the update of one peer.
    """
    draw = np.random.default_rng(1)
    changes = [draw.normal(size=40_000).astype(np.float32) for _ in _WEIGHTS]
    bits = ring.value_bits(32, sum(_WEIGHTS))
    total = np.zeros(40_000, np.int64)
    for number, (weight, change) in enumerate(zip(_WEIGHTS, changes, strict=True)):
        quantizer = ring.Quantizer(32, bits, weight, bytes([number]) * 32)
        total += quantizer.quantize(change, 3.0 * ring.max_value(bits)).view("<i4")
    assert alike(total, sum(w * c for w, c in zip(_WEIGHTS, changes, strict=True))) > 0.5
    # The sum itself is alike to the first one by 0.1, and to the second by 0.3.
    assert alike(digits(total)[0], changes[0]) < 0.05
    assert alike(digits(total)[1], changes[1]) < 0.3


def test_limits_that_clip_all_elements_do_not_tell_signs(tmp_path: Path) -> None:
    """Attack: set limits that clip each element, and read each peer's signs from the sum."""
    room = Room(tmp_path)
    changes = [desk.trainer.change["w"] for desk in room.desks.values()]
    limit = 1e-3
    cards = room.cards()
    plan = room.plan(limits=(limit,) * len(room.plan().sizes), max_weight=256, max_examples=50)
    state = Aggregator(CohortFixed(request=ShareRequest(plan=encode(plan), cards=cards.cards)))
    for decide in (state.fix_sharers, state.fix_survivors, None, None):
        room.play(state)
        if decide:
            state.apply(decide())
    mean, _ = room.mean(state, tmp_path)
    weights = [state.cohort.weights[peer] for peer in room.desks]
    total = (np.float64(mean["w"]) - room.start["w"]) / limit * sum(weights)
    signs = [np.array(one) for one in np.ndindex(2, 2, 2)]  # of the three peers, 0 for minus
    sums = [float(((2 * one - 1) * weights).sum()) for one in signs]
    nearest = np.abs(np.subtract.outer(total, sums)).argmin(axis=-1)
    for number, change in enumerate(changes):
        guessed = np.array([one[number] for one in signs])[nearest]
        assert np.mean(guessed == (change > 0)) < 0.9
