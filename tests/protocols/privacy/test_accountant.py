"""What events cost together, against dp-accounting's values and closed forms."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from msgspec import ValidationError

from protocols.privacy import accountant, events, gaussian
from protocols.privacy.events import (
    DiscreteLaplace,
    Event,
    Exact,
    Failure,
    Gaussian,
    Laplace,
    SampledGaussian,
    SharedGaussian,
)

#: Made by tests/tools/privacy_reference.py.
_REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())


@pytest.mark.parametrize("case", _REFERENCE, ids=lambda case: case["events"][-1]["type"])
def test_epsilon_is_that_of_dp_accounting(case: dict[str, Any]) -> None:
    together = events.decode(json.dumps(case["events"]))
    found = accountant.epsilon_of(together, case["delta"])
    assert found == pytest.approx(case["epsilon"], abs=1e-3)
    # The coarser grid of a first check errs upwards.
    ledger = accountant.epsilon_of(together, case["delta"], accountant.CHECK_POINTS)
    assert -1e-4 < ledger - case["epsilon"] < 3e-3


@pytest.mark.parametrize(
    ("mu", "epsilon", "delta"),
    # Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ), with 50 digits.
    [
        (1.0, 1.0, 0.126936737506643946),
        (1.0, 0.0, 0.382924922548026207),
        (0.1, 0.5, 6.85658245583872656e-9),
        (5.0, 0.5, 0.984117464233966074),
    ],
)
def test_delta_of_the_gaussian(mu: float, epsilon: float, delta: float) -> None:
    assert gaussian.delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 8.0, 300.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-12])
def test_mu_and_epsilon_of_the_gaussian_are_inverse(epsilon: float, delta: float) -> None:
    mu = gaussian.mu_for(epsilon, delta)
    assert gaussian.epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-6)
    assert gaussian.delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-6)


def test_many_pure_answers_cost_what_the_binomial_says() -> None:
    # Kairouz, Oh and Viswanath 2015, arXiv 1311.0776, theorem 3.3.
    one, count, delta = 0.3, 12, 1e-4
    sure = math.exp(one) / (1 + math.exp(one))

    def delta_at(epsilon: float) -> float:
        return sum(
            math.comb(count, up)
            * sure**up
            * (1 - sure) ** (count - up)
            * max(0.0, -math.expm1(epsilon - one * (2 * up - count)))
            for up in range(count + 1)
        )

    exact = gaussian.bisect(lambda epsilon: delta_at(epsilon) <= delta, 0.0, one * count)
    found = accountant.epsilon_of([DiscreteLaplace(one, count)], delta)
    assert exact <= found <= exact + 1e-3
    # A few with a tiny δ cost their sum.
    assert accountant.epsilon_of([DiscreteLaplace(one, 2)], 1e-12) <= 2 * one


_SOME: list[Event] = [
    Gaussian(8.0, 5),
    SampledGaussian(1.5, 0.05, 40),
    SharedGaussian(9.0, 14, count=30),
    Laplace(0.2, 3),
    DiscreteLaplace(0.1, 2),
    Failure(1e-7),
]


def test_every_event_costs_something_and_the_order_does_not_matter() -> None:
    costs = [accountant.epsilon_of(_SOME[:count], 1e-5, 1 << 14) for count in range(7)]
    assert costs[0] == 0.0
    assert all(less < more for less, more in itertools.pairwise(costs))
    assert accountant.epsilon_of(_SOME[::-1], 1e-5, 1 << 14) == pytest.approx(costs[-1], abs=1e-6)


def test_what_has_no_bound_costs_infinitely() -> None:
    assert accountant.epsilon_of([Gaussian(8.0), Exact()], 1e-5) == math.inf
    assert accountant.epsilon_of([Failure(1e-5)], 1e-5) == math.inf
    assert accountant.epsilon_of([Gaussian(0.001, 10**6)], 1e-5) == math.inf
    assert accountant.epsilon_of([SampledGaussian(0.001, 0.5, 10**6)], 1e-5) == math.inf


def test_a_coarse_grid_errs_upwards() -> None:
    for event in (SampledGaussian(1.0, 0.02, 500), Laplace(0.3, 9), DiscreteLaplace(0.37, 9)):
        fine, coarse = (accountant.epsilon_of([event], 1e-6, 1 << bits) for bits in (17, 12))
        assert fine - 1e-6 <= coarse


@pytest.mark.parametrize(("rate", "count"), [(1.0, 60), (0.1, 200), (0.01, 3000)])
def test_noise_is_enough_and_little_more(rate: float, count: int) -> None:
    noise = accountant.noise_for(3.0, 1e-5, rate, count)
    assert accountant.epsilon_of([SampledGaussian(noise, rate, count)], 1e-5) <= 3.0 + 1e-6
    assert accountant.epsilon_of([SampledGaussian(noise * 0.98, rate, count)], 1e-5) > 3.0


def test_ledger_entries_are_read_strictly() -> None:
    assert events.decode(events.encode(tuple(_SOME))) == tuple(_SOME)
    for bad in (
        '[{"type":"Gaussian","noise":0}]',
        '[{"type":"SampledGaussian","noise":1,"rate":2}]',
        '[{"type":"Gaussian","noise":1,"count":0}]',
        '[{"type":"SharedGaussian","noise":1,"peers":1}]',
        '[{"type":"Nothing"}]',
    ):
        with pytest.raises(ValidationError):
            events.decode(bad)
