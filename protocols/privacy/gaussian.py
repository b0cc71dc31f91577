"""The Gaussian mechanism, exactly: δ for ε and back (Balle and Wang 2018, arXiv 1805.06530).

Gaussian noise is described by one number: μ, what a row changes over the standard deviation. Any
number of such answers, with μ₁, μ₂ …, together are one with μ = √(μ₁² + μ₂² + …) (Dong et al. 2019,
arXiv 1905.02383, corollary 3.3). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: ε of μ beyond this is above 10⁶: no protection.
_MAX_MU = 1500.0
_BISECTIONS = 200


def log_cdf(x: float) -> float:
    """The logarithm of the normal distribution function."""
    if x > -20:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)


def delta_of(mu: float, epsilon: float) -> float:
    """The least δ for this ε: Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (theorem 8)."""
    if mu <= 0:
        return 0.0
    first = log_cdf(mu / 2 - epsilon / mu)
    second = epsilon + log_cdf(-mu / 2 - epsilon / mu)
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


def epsilon_of(mu: float, delta: float) -> float:
    """The least ε ≥ 0 for this δ; infinite if that is no protection."""
    if mu > _MAX_MU:
        return math.inf
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1
    return bisect(lambda epsilon: delta_of(mu, epsilon) <= delta, 0.0, most)


def mu_for(epsilon: float, delta: float) -> float:
    """The largest μ that costs at most (ε, δ)."""
    return bisect(lambda inverse: delta_of(1 / inverse, epsilon) <= delta, 1e-9, 1e9) ** -1


def bisect(
    is_enough: Callable[[float], bool], low: float, high: float, tolerance: float = 0.0
) -> float:
    """The least number from which on `is_enough` holds, to the last bits, or up to this share of
    it more; `high` is enough."""
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
        if not low < middle < high or high - low <= tolerance * high:
            break
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
