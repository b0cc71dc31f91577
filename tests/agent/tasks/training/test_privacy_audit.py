"""An audit of training with noise, by what an attacker finds out (Steinke et al. 2023).

"Privacy Auditing with One (1) Training Run", arXiv 2305.08846: m rows are in the training or not,
each by a coin; the attacker guesses for some of them from the result. With (ε, δ), it is right
about as often as a coin of e^ε to 1. The rows are the strongest there are: each moves a weight of
its own by the whole clip.
"""

from __future__ import annotations

import math
import random
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch

from agent.tasks.training import secret_noise
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.torch_loop import Examples, PrivateLoss, TrainingLoop, autograd_step
from protocols.model.weights import Weights
from protocols.privacy.private_training import PrivateTraining
from tests.support.extraction import Canaries, Wards

ROWS, RUNS, DELTA = 1000, 20, 1e-5
#: Of guesses for the rows that are most surely in or out.
SHARE = 0.1


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the noise are the same each time, so that an audit has one result."""
    monkeypatch.setattr(secrets, "token_bytes", random.Random(3).randbytes)


def scores_of(included: np.ndarray, epsilon: float, steps: int, shared: int = 1) -> np.ndarray:
    """The weights after training on the included rows, one weight for each row."""
    rows = torch.eye(ROWS)[torch.from_numpy(np.flatnonzero(included))]
    loop = TrainingLoop()
    loop.protect(PrivateTraining(epsilon, DELTA, clip=1.0, rounds=1, shared=shared))
    plan = read_hyperparameters({"batch_size": 0, "epochs": steps, "lr": 1.0})

    def losses(w: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -3.0 * x @ w["w"]  # its gradient is clipped to 1

    outcome = loop.train(
        {"w": np.zeros(ROWS, np.float32)},
        plan,
        Examples(rows, torch.zeros(len(rows))),
        autograd_step(lambda w, x, y: losses(w, x, y).mean()),
        lambda *told: None,
        private_loss=PrivateLoss(losses),
    )
    return np.asarray(outcome.weights["w"], np.float64)


def scores_of_sum(included: np.ndarray, epsilon: float, shared: int, peers: int) -> np.ndarray:
    """What the sum of `peers` peers says of their rows, if `shared` of them have enough noise."""
    total = np.zeros(ROWS)
    for part in range(peers):
        mine = included & (np.arange(ROWS) % peers == part)
        total += mine.sum() * scores_of(mine, epsilon, 1, shared)
    return total


def p_value(guesses: int, right: int, epsilon: float) -> float:
    """The chance of `right` or more right guesses, if the claim holds (their theorem 5.2)."""
    q = 1 / (1 + math.exp(-epsilon))

    def chance(k: int) -> float:
        return math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k)

    tail = sum(chance(k) for k in range(right, guesses + 1))
    below = np.cumsum([chance(right - i) for i in range(1, right + 1)])
    alpha = max((float(mass) / i for i, mass in enumerate(below, 1)), default=0.0)
    return min(1.0, tail + alpha * DELTA * 2 * ROWS)


def lower_bound(included: np.ndarray, scores: np.ndarray) -> float:
    """The largest ε that the guesses refute, with 95 % confidence."""
    order, k = np.argsort(scores), int(ROWS * SHARE / 2)
    right = int(included[order[-k:]].sum() + (~included[order[:k]]).sum())
    low, high = 0.0, 12.0
    if p_value(2 * k, right, 0.0) > 0.05:
        return 0.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(2 * k, right, middle) < 0.05 else (low, middle)
    return low


@pytest.mark.long
@pytest.mark.parametrize(("epsilon", "steps"), [(1.0, 1), (3.0, 1), (3.0, 5)])
def test_the_audit_refutes_the_claim_in_no_more_runs_than_by_chance(
    epsilon: float, steps: int
) -> None:
    refuted, advantage = 0, []
    for seed in range(RUNS):
        included = np.random.default_rng(seed).random(ROWS) < 0.5
        scores = scores_of(included, epsilon, steps)
        refuted += lower_bound(included, scores) > epsilon
        # The best attack on one row compares its weight with the middle.
        guess = scores > np.median(scores)
        advantage.append(guess[included].mean() - guess[~included].mean())
    assert refuted <= 4  # of 20 at 5 %: more has a chance of 0.3 %
    bound = (math.exp(epsilon) - 1 + 2 * DELTA) / (math.exp(epsilon) + 1)
    assert np.mean(advantage) <= bound
    assert np.mean(advantage) > 0.05  # the rows are strong enough for an audit


@pytest.mark.long
@pytest.mark.parametrize("shared", [1, 5])
@pytest.mark.parametrize(
    ("epsilon", "factor"), [(0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (1.0, 0.25)]
)
def test_the_audit_finds_noise_that_is_missing(
    epsilon: float, factor: float, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the audit itself: without noise, or with a quarter of it, it refutes the claim."""
    drawn = secret_noise.SecretNoise.normals
    monkeypatch.setattr(
        secret_noise.SecretNoise, "normals", lambda self, count: factor * drawn(self, count)
    )
    refuted = 0
    for seed in range(RUNS):
        included = np.random.default_rng(seed).random(ROWS) < 0.5
        refuted += lower_bound(included, scores_of_sum(included, epsilon, shared, shared)) > epsilon
    assert refuted >= 18


@pytest.mark.long
@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_the_audit_does_not_refute_noise_that_peers_share(epsilon: float, tmp_path: Path) -> None:
    """As many peers as the noise is for; the attacker gets their secure sum."""
    refuted, peers = 0, 3
    private = PrivateTraining(epsilon, DELTA, clip=1.0, rounds=1, shared=peers)
    rows, of_peer = np.eye(ROWS, dtype=np.float32), np.arange(ROWS) % peers
    for seed in range(RUNS):
        included = np.random.default_rng(seed).random(ROWS) < 0.5
        tasks = [Canaries(rows[included & (of_peer == peer)]) for peer in range(peers)]
        start = Weights({"w": np.zeros((1, ROWS), np.float32)})
        (folder := tmp_path / str(seed)).mkdir()
        found = Wards(folder, start, tasks, private).secure()["w"][0]
        refuted += lower_bound(included, found) > epsilon
    assert refuted <= 4


@pytest.mark.long
def test_the_audit_finds_that_a_part_of_the_noise_is_too_little() -> None:
    """Control: the update of one of 16 peers alone, as no secure sum shows it."""
    refuted = 0
    for seed in range(RUNS):
        included = np.random.default_rng(seed).random(ROWS) < 0.5
        refuted += lower_bound(included, scores_of_sum(included, 1.0, 16, 1)) > 1.0
    assert refuted >= 18
