"""The chance that a cohort is lost is that of the coordinator's own decisions."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from benchmarks.speed import cohort_losses
from benchmarks.speed.cohort_losses import chance_of_loss
from protocols.errors import CohortLost
from protocols.privacy.secagg import cohort as cohort_module
from protocols.privacy.secagg.aggregator import (
    Aggregator,
    CohortFixed,
    SharersFixed,
    SurvivorsFixed,
)
from protocols.privacy.secagg.cohort import MIN_COHORT, Pins, neighbor_count, threshold
from tests.support.fleet_harness import ROOT
from tests.support.secure_cohort import Machine, plan, share_request

#: When a peer drops out.
STAYS, BEFORE_SHARES, BEFORE_UPLOAD, AFTER_UPLOAD = range(4)


def is_lost(state: Aggregator, phases: dict[str, int], minimum: int) -> bool:
    """Whether the coordinator loses this cohort. `phases`: when each peer drops out."""

    def those(*wanted: int) -> dict[str, object]:
        return {peer: None for peer, phase in phases.items() if phase in wanted}

    state.sharers = state.survivors = ()
    state.shares = those(STAYS, BEFORE_UPLOAD, AFTER_UPLOAD)  # type: ignore[assignment]
    try:
        state.apply(SharersFixed(sharers=state.fix_sharers().sharers))
        sent = those(STAYS, AFTER_UPLOAD)
        state.uploads = {peer: "" for peer in state.sharers if peer in sent}
        state.apply(SurvivorsFixed(survivors=state.fix_survivors().survivors))
    except CohortLost:
        return True
    state.told = {peer: None for peer in state.survivors if phases[peer] == STAYS}  # type: ignore[misc]
    return len(state.survivors) < minimum or not state.can_recover()


def exact_chance(peers: int, early: float, late: float, minimum: int) -> float:
    """The sum over all ways in which peers drop out. Half of the early ones have shared."""
    rnd, pins = random.Random(0), Pins(frozenset())
    cards = [Machine(number, pins, rnd).card() for number in range(peers)]
    state = Aggregator(CohortFixed(request=share_request(cards, plan())))
    chances = (1 - early) * (1 - late), early / 2, early / 2, (1 - early) * late
    total = 0.0
    for phases in itertools.product(range(4), repeat=peers):
        if is_lost(state, dict(zip(state.cohort.peers, phases, strict=True)), minimum):
            total += float(np.prod([chances[phase] for phase in phases]))
    return total


@pytest.mark.parametrize("peers", [3, 4, 5])
@pytest.mark.parametrize(("early", "late"), [(0.2, 0.0), (0.0, 0.2), (0.05, 0.1)])
def test_it_is_exact_if_all_are_neighbors(peers: int, early: float, late: float) -> None:
    for minimum in (3, peers):
        expected = exact_chance(peers, early, late, minimum)
        assert chance_of_loss(peers, early, late, minimum) == pytest.approx(expected, rel=1e-9)


def small_ring(peers: int) -> int:
    return 4 if peers > 5 else peers - 1


@pytest.mark.parametrize(("early", "late"), [(0.1, 0.0), (0.03, 0.03)])
def test_it_is_an_upper_bound_for_a_ring(
    early: float, late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cohort_module, cohort_losses):
        monkeypatch.setattr(module, "neighbor_count", small_ring)
    exact = exact_chance(6, early, late, MIN_COHORT)
    union = 6 * chance_of_loss(5, early, late)
    assert exact < chance_of_loss(6, early, late) < union


RINGS = [(128, 0.2), (128, 0.25), (256, 0.2), (256, 0.25), (512, 0.25), (1000, 0.25)]


@pytest.mark.parametrize(("peers", "rate"), RINGS)
def test_the_bound_is_near_the_chance_of_simulated_rings(peers: int, rate: float) -> None:
    group, times = neighbor_count(peers) + 1, 4000
    lost = np.random.default_rng(0).random((times, peers)) < rate
    sums = np.cumsum(np.concatenate([lost, lost[:, : group - 1]], 1), 1)
    windows = np.concatenate([sums[:, group - 1 : group], sums[:, group:] - sums[:, :-group]], 1)
    assert windows.shape == (times, peers)
    simulated = float((windows.max(1) > group - threshold(group)).mean())
    assert simulated < chance_of_loss(peers, rate) < 4 * simulated


def test_the_numbers_in_the_notes_are_the_computed_ones() -> None:
    notes = (ROOT / "docs/notes/secure-aggregation.md").read_text()
    assert cohort_losses.table() in notes
    assert f"5 % lose the cohort with a chance of {chance_of_loss(3, 0.0, 0.05):.2g}." in notes
