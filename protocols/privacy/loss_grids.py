"""Privacy loss distributions on a grid: what one event may tell, for each event.

The loss of an answer is log P/Q, where P and Q are its probabilities with and without the row.
Losses between two points of the grid are divided between them so that the probabilities under both
P and Q stay as they are ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380, section 4):
an upper bound, and tight in the square of the grid's step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Standard deviations of the Gaussian that are on the grid. Beyond them are 10⁻¹⁹.
_REACH = 9.0
_erfc = np.frompyfunc(math.erfc, 1, 1)


class LossGrid(NamedTuple):
    """Probabilities, float64[n], of the losses (`first` + 0, 1, …) times the grid's step; and of
    an infinite loss."""

    first: int
    mass: Floats
    infinite: float = 0.0


def connect_dots(first: int, p: Floats, q: Floats, step: float, above: float = 0.0) -> LossGrid:
    """The grid of losses with probability p[i] and q[i] in (first + i, first + i + 1] times `step`.

    `above`: the probability under P of more than that.
    """
    # a at the lower and b at the upper point, with a + b = p and a/e^low + b/e^high = q.
    low = (first + np.arange(len(p))) * step
    with np.errstate(over="ignore"):
        b = (p - np.exp(low) * q) / -math.expm1(-step)
    b = np.clip(np.nan_to_num(b, posinf=math.inf, neginf=0.0), 0.0, p)
    mass = np.zeros(len(p) + 1)
    mass[1:] += b
    mass[:-1] += p - b
    return LossGrid(first, mass, above)


def gaussian(noise: float, rate: float, step: float) -> tuple[LossGrid, LossGrid]:
    """Of a sum over a Poisson sample with Gaussian noise: for a row that is removed, and added."""
    mu = 1 / noise

    def loss(x: float) -> float:
        exponent = mu * x - mu * mu / 2
        if exponent > 500:
            return exponent + math.log(rate)
        return math.log1p(rate * math.expm1(exponent))

    least, most = math.floor(loss(-_REACH) / step), math.ceil(loss(mu + _REACH) / step)
    losses = np.arange(least, most + 1) * step
    x = np.full(len(losses), -math.inf)
    # e^loss = 1 - rate + rate e^(mu x - mu²/2); no x has a loss of log(1 - rate) or less
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        inner = np.where(losses > 500, losses - math.log(rate), np.log1p(np.expm1(losses) / rate))
    has_x = np.isfinite(inner)
    x[has_x] = (inner[has_x] + mu * mu / 2) / mu
    without, beyond_without = _normal_masses(x)
    with_row, beyond_with = _normal_masses(x - mu)
    mixed = (1 - rate) * without + rate * with_row
    beyond_mixed = (1 - rate) * beyond_without + rate * beyond_with
    below_without = max(0.0, 1.0 - float(without.sum()) - beyond_without)
    below_mixed = max(0.0, 1.0 - float(mixed.sum()) - beyond_mixed)
    # What is below the grid counts as its lowest loss.
    removed = connect_dots(least, mixed, without, step, beyond_mixed)
    removed.mass[0] += below_mixed
    added = connect_dots(-most, without[::-1].copy(), mixed[::-1].copy(), step, below_without)
    added.mass[0] += beyond_without
    return removed, added


def _normal_masses(edges: Floats) -> tuple[Floats, float]:
    """The normal distribution's probabilities between the edges, and above the last."""
    upper, lower = (
        0.5 * np.asarray(_erfc(sign * edges / math.sqrt(2)), np.float64) for sign in (1, -1)
    )
    masses = np.where(edges[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1])
    return np.maximum(masses, 0.0), float(upper[-1])


def laplace(epsilon: float, step: float) -> LossGrid:
    """Of a number with Laplace noise of the scale 1/ε; the same for both directions."""
    edge = math.ceil(epsilon / step)
    # Between the two values, at x in (0, 1), the loss is ε (1 - 2x).
    x = np.clip((1 - np.arange(-edge, edge + 1) * step / epsilon) / 2, 0.0, 1.0)
    width = x[:-1] - x[1:]
    p = 0.5 * np.exp(-epsilon * x[1:]) * -np.expm1(-epsilon * width)
    q = 0.5 * np.exp(-epsilon * (1 - x[:-1])) * -np.expm1(-epsilon * width)
    _add_atoms(p, q, epsilon, 0.5, step)
    return connect_dots(-edge, p, q, step)


def discrete_laplace(epsilon: float, step: float) -> LossGrid:
    """Of a count with discrete Laplace noise, and the worst of all that cost ε alone: the loss is
    ε or -ε (Dwork and Roth 2014, section 3.5)."""
    edge = max(1, math.ceil(epsilon / step))
    p, q = np.zeros(2 * edge), np.zeros(2 * edge)
    _add_atoms(p, q, epsilon, 1 / (1 + math.exp(-epsilon)), step)
    return connect_dots(-edge, p, q, step)


def _add_atoms(p: Floats, q: Floats, epsilon: float, mass: float, step: float) -> None:
    """Add the losses ε, of probability `mass` under P, and -ε, of that under Q."""
    last = len(p) - 1
    below = min(last, max(0, math.ceil(-epsilon / step) + len(p) // 2 - 1))
    for place, with_row, without in (
        (last, mass, mass * math.exp(-epsilon)),
        (below, mass * math.exp(-epsilon), mass),
    ):
        p[place] += with_row
        q[place] += without


def log_moment(grid: LossGrid, order: float, step: float) -> float:
    """log E[e^(order · loss)] of the finite losses."""
    losses: Any = (grid.first + np.arange(len(grid.mass))) * step
    exponents = order * losses
    top = float(exponents[grid.mass > 0].max(initial=-math.inf))
    if top == -math.inf:
        return -math.inf
    return top + math.log(float((grid.mass * np.exp(np.minimum(exponents - top, 0.0))).sum()))
