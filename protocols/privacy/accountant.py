"""The cost of events together: one (ε, δ) for all of them.

Gaussian noise over all rows composes exactly (`gaussian`). Everything else is composed by its
privacy loss distribution, by FFT (Koskela et al. 2020, arXiv 1906.03049; Gopi et al. 2021, arXiv
2106.02848). Both are upper bounds, and within 10⁻³ of the true ε. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from protocols.privacy import gaussian, loss_grids
from protocols.privacy.events import (
    MAX_NOISE,
    DiscreteLaplace,
    Event,
    Exact,
    Failure,
    Gaussian,
    Laplace,
    SampledGaussian,
    SharedGaussian,
)
from protocols.privacy.loss_grids import Floats, LossGrid

#: Losses beyond the grid of the sum have at most this probability, which counts as δ.
_TAIL = 1e-15
#: Points of the grid of the sum; fewer for a first check and a search, which errs upwards.
_POINTS, CHECK_POINTS, _SEARCH_POINTS = 1 << 17, 1 << 15, 1 << 14
_MIN_STEP, _FIRST_STEP = 1e-5, 1e-2
#: Events beyond these are no protection, alone or together: an infinite ε, without a grid.
_MIN_NOISE, _MAX_EPSILON, _MAX_RANGE = 0.05, 500.0, 5_000.0
_ORDERS = tuple(2.0**power for power in range(-8, 12))


class _Loss(NamedTuple):
    """Losses of all events together: float64[n] probabilities of first, first + step …"""

    first: float
    step: float
    mass: Floats
    infinite: float

    def epsilon(self, delta: float) -> float:
        if self.infinite >= delta:
            return math.inf
        losses = self.first + self.step * np.arange(len(self.mass))
        mass = np.maximum(self.mass, 0.0)
        # δ(ε) = infinite + Σ mass (1 - e^(ε - loss)) over the losses above ε
        above = np.cumsum(mass[::-1])[::-1]
        shrunk = np.cumsum((mass * np.exp(-np.clip(losses, -700, 700)))[::-1])[::-1]
        with np.errstate(over="ignore", invalid="ignore"):
            deltas = self.infinite + above - np.exp(np.clip(losses, -700, 700)) * shrunk
        enough = np.flatnonzero((deltas <= delta) & (losses >= 0))
        if not len(enough):
            return float(losses[-1])
        place = int(enough[0])
        if place == 0 or shrunk[place] <= 0:
            return max(0.0, float(losses[place]))
        # Between two losses, δ is linear in e^ε.
        exact = math.log(max(self.infinite + above[place] - delta, 1e-300) / shrunk[place])
        return min(max(0.0, exact), float(losses[place]))


def epsilon_of(events: Iterable[Event], delta: float, points: int = _POINTS) -> float:
    """The ε of all events together at this δ, in (0, 1); infinite if there is no bound.

    `points` is the size of the grid: with fewer, ε is slightly larger.
    """
    counts, mu_squared, failure = Counter[Event](), 0.0, 0.0
    for event in events:
        match event:
            case Exact():
                return math.inf
            case Failure(found):
                failure += found
            case Gaussian(noise, count) | SampledGaussian(noise, 1.0, count):
                mu_squared += count / noise**2
            case SharedGaussian():
                mu_squared += event.count / event.noise**2
            case SampledGaussian(noise, rate, count):
                counts[SampledGaussian(noise, rate)] += count
            case Laplace(epsilon, count) if epsilon:
                counts[Laplace(epsilon)] += count
            case DiscreteLaplace(epsilon, count) if epsilon:
                counts[DiscreteLaplace(epsilon)] += count
    if failure >= delta:
        return math.inf if counts or mu_squared or failure else 0.0
    mu = math.sqrt(mu_squared)
    if not counts:
        return gaussian.epsilon_of(mu, delta - failure)
    pure = sum(n * e.epsilon for e, n in counts.items() if isinstance(e, Laplace | DiscreteLaplace))
    if mu:
        counts[Gaussian(min(1 / mu, MAX_NOISE))] = 1
    if any(map(_is_hopeless, counts)):
        return math.inf
    total = max(
        _compose(counts, direction, points).epsilon(delta - failure) for direction in range(2)
    )
    is_pure = all(isinstance(e, Laplace | DiscreteLaplace) for e in counts)
    return min(total, pure) if is_pure else total


def epsilon_above(limit: float, events: Iterable[Event], delta: float) -> float:
    """The ε of all events together if it exceeds `limit`, else 0."""
    together = list(events)
    if epsilon_of(together, delta, CHECK_POINTS) <= limit:
        return 0.0
    total = epsilon_of(together, delta)
    return total if total > limit else 0.0


def _is_hopeless(event: Event) -> bool:
    if isinstance(event, Gaussian | SampledGaussian):
        return event.noise < _MIN_NOISE
    return isinstance(event, Laplace | DiscreteLaplace) and event.epsilon > _MAX_EPSILON


def _compose(counts: Counter[Event], direction: int, points: int) -> _Loss:
    """The losses of all events together, for a row that is removed (0) or added (1)."""
    step = _FIRST_STEP
    low, high = _range(_grids(counts, step, direction), step)
    if high - low > _MAX_RANGE:
        return _Loss(0.0, step, np.zeros(1), 1.0)
    step = max(_MIN_STEP, 1.05 * (high - low) / points)
    grids = _grids(counts, step, direction)
    low, high = _range(grids, step)
    size = 1 << math.ceil(math.log2((high - low) / step + 2))
    spectrum = np.ones(size // 2 + 1, np.complex128)
    first, log_finite = 0, 0.0
    for grid, count in grids:
        padded = np.zeros(-(-len(grid.mass) // size) * size)
        padded[: len(grid.mass)] = grid.mass
        spectrum *= np.fft.rfft(padded.reshape(-1, size).sum(0)) ** count
        first += grid.first * count
        log_finite += count * math.log1p(-min(grid.infinite, 0.5))
    mass = np.fft.irfft(spectrum, size)
    start = math.floor(low / step)
    mass = np.roll(mass, (first - start) % size)
    return _Loss(start * step, step, mass, -math.expm1(log_finite) + 2 * _TAIL)


def _grids(counts: Counter[Event], step: float, direction: int) -> list[tuple[LossGrid, int]]:
    return [(_grid(event, step)[direction], count) for event, count in counts.items()]


def _grid(event: Event, step: float) -> tuple[LossGrid, LossGrid]:
    match event:
        case Gaussian(noise):
            return loss_grids.gaussian(noise, 1.0, step)
        case SampledGaussian(noise, rate):
            return loss_grids.gaussian(noise, rate, step)
        case Laplace(epsilon):
            return (loss_grids.laplace(epsilon, step),) * 2
        case DiscreteLaplace(epsilon):
            return (loss_grids.discrete_laplace(epsilon, step),) * 2
        case _:
            raise AssertionError(event)


def _range(grids: Sequence[tuple[LossGrid, int]], step: float) -> tuple[float, float]:
    """The losses between which the sum is, but for a probability of `_TAIL` on each side (by
    Chernoff's bound)."""
    ends = []
    for sign in (-1, 1):
        far = float(sum(n * (g.first if sign < 0 else g.first + len(g.mass) - 1) for g, n in grids))
        best = far * step * sign
        for order in _ORDERS:
            moment = sum(n * loss_grids.log_moment(g, sign * order, step) for g, n in grids)
            best = min(best, (moment - math.log(_TAIL)) / order)
        ends.append(sign * best)
    return ends[0] - step, ends[1] + step


def noise_for(epsilon: float, delta: float, rate: float, count: int) -> float:
    """The least noise (see `SampledGaussian`) with which `count` steps cost at most (ε, δ)."""
    exact = math.sqrt(count) / gaussian.mu_for(epsilon, delta)
    if rate >= 1:
        return exact

    def cost(noise: float) -> float:
        return epsilon_of([SampledGaussian(noise, rate, count)], delta, _SEARCH_POINTS)

    low, high = min(exact, 0.3), max(exact, 0.3)  # without sampling, the cost is no less
    return gaussian.bisect(lambda noise: cost(noise) <= epsilon, low, high, tolerance=1e-4)
