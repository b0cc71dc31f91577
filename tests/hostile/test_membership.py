"""A coordinator that tells from a run whether a row is in the table of a peer.

The rows are the strongest there are: each moves a weight of its own by the whole clip, and the
attacker knows everything else. So each weight is a trial of the best attack on one row.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from agent.tasks.training.secret_noise import SecretNoise
from protocols.model.weights import Weights
from protocols.privacy import gaussian
from protocols.privacy.private_training import PrivateTraining
from tests.support.extraction import Canaries, Floats, Wards

pytestmark = pytest.mark.attack("20.3", by="coordinator")

Members = npt.NDArray[np.bool_]
EPSILON, DELTA, PEERS, ROUNDS, TRIALS = 3.0, 1e-5, 3, 2, 4000
#: The peers share the noise, or each adds all of its own.
SHARED = PrivateTraining(EPSILON, DELTA, clip=1.0, rounds=ROUNDS, shared=PEERS)
OWN = SHARED._replace(shared=1)
#: What (ε, δ) allows any attack (Kairouz et al. 2015, arXiv 1311.0776, theorem 2.1).
BOUND = (math.exp(EPSILON) - 1 + 2 * DELTA) / (math.exp(EPSILON) + 1)
#: The same for Gaussian noise of this size (Dong et al. 2019, arXiv 1905.02383, section 2).
MU = gaussian.mu_for(EPSILON, DELTA)
#: Four standard deviations of an advantage.
MARGIN = 4 * math.sqrt(0.5 / (TRIALS / 2))


def best_advantage(mu: float) -> float:
    """TPR - FPR of the best test between two normal distributions `mu` apart: 2 Φ(mu/2) - 1."""
    return math.erf(mu / math.sqrt(8))


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of noise and masks are the same each time, so that a test has one result."""
    monkeypatch.setattr(secrets, "token_bytes", random.Random(3).randbytes)


def drawn(seed: int) -> Members:
    return np.random.default_rng(seed).random(TRIALS) < 0.5


def tasks_of(inside: Members) -> list[Canaries]:
    """Peers with the rows that are inside; each row is always at the same peer."""
    rows = np.eye(TRIALS, dtype=np.float32)
    of_peer = np.arange(TRIALS) % PEERS
    return [Canaries(rows[inside & (of_peer == peer)]) for peer in range(PEERS)]


def wards(folder: Path, inside: Members, private: PrivateTraining | None) -> Wards:
    start = Weights({"w": np.zeros((1, TRIALS), np.float32)})
    return Wards(folder, start, tasks_of(inside), private)


def sum_of(fleet: Wards) -> Floats:
    return fleet.secure()["w"][0]


def updates_of(fleet: Wards) -> Floats:
    """All plain updates. Each row is in one of them."""
    found = [fleet.plain(peer)["w"][0] for peer in range(PEERS)]
    return np.stack(found)[np.arange(TRIALS) % PEERS, np.arange(TRIALS)]


def advantage(inside: Members, scores: Floats, middle: float = 0.5) -> float:
    """TPR - FPR of the likelihood-ratio test with even odds."""
    guess = scores > middle
    return float(guess[inside].mean() - guess[~inside].mean())


def after_all_rounds(fleet: Wards, look: Callable[[Wards], Floats]) -> Floats:
    return np.mean([look(fleet) for _ in range(ROUNDS)], axis=0)


@pytest.mark.parametrize(("private", "look"), [(SHARED, sum_of), (OWN, updates_of)])
def test_noise_hides_who_is_in_a_table(
    tmp_path: Path, private: PrivateTraining, look: Callable[[Wards], Floats]
) -> None:
    """Attack: the likelihood-ratio test for a row over all rounds of a run with ε = 3.

    On the sums of a secure run, and on the updates of peers with noise of their own.
    """
    inside = drawn(1)
    found = advantage(inside, after_all_rounds(wards(tmp_path, inside, private), look))
    assert found + MARGIN < BOUND
    assert found == pytest.approx(best_advantage(MU), abs=MARGIN), "and no attack is better"


@pytest.mark.parametrize("look", [sum_of, updates_of])
def test_without_noise_everybody_is_found(tmp_path: Path, look: Callable[[Wards], Floats]) -> None:
    """Control: the same test finds every row without noise, in plain updates and in secure sums."""
    inside = drawn(1)
    assert advantage(inside, look(wards(tmp_path, inside, None))) == 1.0


@pytest.mark.long
@pytest.mark.parametrize(("factor", "least"), [(0.0, BOUND), (0.5, best_advantage(1.5 * MU))])
def test_the_test_for_rows_sees_noise_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, least: float
) -> None:
    """Control: with none or half of the noise, the same test finds more than is allowed."""
    normals = SecretNoise.normals
    monkeypatch.setattr(SecretNoise, "normals", lambda self, n: factor * normals(self, n))
    inside = drawn(1)
    found = advantage(inside, after_all_rounds(wards(tmp_path, inside, SHARED), sum_of))
    assert found > max(least, best_advantage(MU) + MARGIN)


@pytest.mark.parametrize("private", [None, SHARED])
def test_sums_before_and_after_rows_come_and_go(
    tmp_path: Path, private: PrivateTraining | None
) -> None:
    """Attack: subtract two sums, between which each row may have come or gone.

    Without noise, the difference tells each of them.
    """
    before, after = drawn(1), drawn(2)
    fleet = wards(tmp_path, before, private)
    first = sum_of(fleet)
    fleet.change_rows(tasks_of(after))
    change = sum_of(fleet) - first
    found = [
        advantage(after[before == had], change[before == had], middle)
        for had, middle in ((False, 0.5), (True, -0.5))
    ]
    if private is None:
        assert found == [1.0, 1.0]
        return
    # One round has MU / √2, and the difference has the noise of two.
    assert max(found) + MARGIN < BOUND
    assert np.mean(found) == pytest.approx(best_advantage(MU / 2), abs=MARGIN)
