"""Tail probabilities of the normal, t, F and chi-squared distributions. Pure.

Incomplete beta and gamma functions by series and continued fractions (Press et al., Numerical
Recipes, 3rd edition, sections 6.2 and 6.4), to about 1e-13.
"""

from __future__ import annotations

import math
from statistics import NormalDist

#: Half the width of a 95 % interval, in standard errors.
REACH_95 = NormalDist().inv_cdf(0.975)
_TINY, _EPSILON, _MAX_TERMS = 1e-300, 1e-16, 100_000


def normal_p(z: float) -> float:
    """The probability of a standard normal value further from 0 than z."""
    return math.erfc(abs(z) / math.sqrt(2))


def t_p(t: float, df: float) -> float:
    """The probability of a t value further from 0."""
    return _beta(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0


def t_quantile(q: float, df: float) -> float:
    """The q-quantile of the t distribution, for q >= 0.5."""
    low, high = 0.0, 1.0
    while t_p(high, df) / 2 > 1 - q:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_p(middle, df) / 2 > 1 - q else (low, middle)
    return high


def f_p(f: float, df1: float, df2: float) -> float:
    """The probability of a larger F value."""
    total = df2 + df1 * f
    return _beta(df2 / total, df1 * f / total, df2 / 2, df1 / 2) if math.isfinite(f) else 0.0


def chi2_p(x: float, df: float) -> float:
    """The probability of a larger chi-squared value."""
    if x <= 0:
        return 1.0
    a, x = df / 2, x / 2
    front = math.exp(a * math.log(x) - x - math.lgamma(a)) if x < 1e300 else 0.0
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, _MAX_TERMS):
            term *= x / (a + n)
            total += term
            if term < total * _EPSILON:
                break
        return max(0.0, 1 - front * total)
    b = x + 1 - a
    c, d = 1 / _TINY, 1 / b
    found = d
    for n in range(1, _MAX_TERMS):
        factor = -n * (n - a)
        b += 2
        d = 1 / (factor * d + b or _TINY)
        c = b + factor / c or _TINY
        found *= d * c
        if abs(d * c - 1) < _EPSILON:
            break
    return front * found


def _beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularized incomplete beta function at x. `rest`: 1 - x, with all its digits."""
    if x <= 0 or rest <= 0:
        return float(rest <= 0)
    log_x, log_rest = (
        math.log1p(-other) if other < 0.5 else math.log(value)
        for value, other in ((x, rest), (rest, x))
    )
    log_front = a * log_x + b * log_rest
    large, small = max(a, b), min(a, b)
    front = math.exp(log_front + _log_gamma_ratio(large, small) - math.lgamma(small))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(rest, b, a) / b


def _log_gamma_ratio(a: float, b: float) -> float:
    """log(gamma(a + b) / gamma(a)), by Stirling's series where the difference would lose digits."""
    if a < 100:
        return math.lgamma(a + b) - math.lgamma(a)
    rest = [1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5) for x in (a + b, a)]
    return (a + b - 0.5) * math.log1p(b / a) + b * math.log(a) - b + rest[0] - rest[1]


def _beta_fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or _TINY)
    found = d
    for m in range(1, _MAX_TERMS):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + factor * d or _TINY)
            c = 1 + factor / c or _TINY
            found *= d * c
        if abs(d * c - 1) < _EPSILON:
            break
    return found
