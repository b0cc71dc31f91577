"""Training with noise for single rows: the settings of a run, and the noise that they require.

A peer adds the noise to its own gradients (DP-SGD, Abadi et al. 2016, arXiv 1607.00133), so its
owner need not trust any other machine. The settings of a run say what the whole run may cost; each
peer chooses the noise for its own number of rows. In a secure run, the peers of a sum can share
the noise (`shared_noise`). Pure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from protocols.errors import UsageError
from protocols.privacy import accountant
from protocols.privacy.events import MAX_NOISE, MAX_SHARERS, SampledGaussian, SharedGaussian

#: Names in the settings of work. They are those of the run, and no task sees them.
EPSILON, DELTA, CLIP, ROUNDS = "dp_epsilon", "dp_delta", "dp_clip", "dp_rounds"
#: Only in runs with shared noise. Agents of older versions refuse work with a setting that they do
#: not know.
SHARED = "dp_shared"
SETTINGS = frozenset({EPSILON, DELTA, CLIP, ROUNDS, SHARED})
#: From MIN to MAX, both included. More ε than that is no protection.
MIN_EPSILON, MAX_EPSILON = 0.01, 100.0
MIN_DELTA, MAX_DELTA = 1e-12, 1e-2
MIN_CLIP, MAX_CLIP = 1e-6, 1e6
MAX_ROUNDS = 1_000_000
#: Built-in tasks that can train with noise: each of their examples is a row or picture of the
#: owner. In others, examples overlap (`motion`, texts).
TASKS = ("images", "mnist", "tabular")
#: Built-in tasks that cannot. Whether another one can, its agents say.
OTHER_TASKS = ("lora", "motion", "ping", "text-lm")


class PrivateTraining(NamedTuple):
    """All `rounds` of a run cost at most (`epsilon`, `delta`) for each row of a peer. The gradient
    of one row has at most the norm `clip`. `shared`: the number of honest peers of a secure sum
    that add the noise together; 1: each peer adds all of it.
    """

    epsilon: float
    delta: float
    clip: float
    rounds: int
    shared: int = 1

    @property
    def is_shared(self) -> bool:
        return self.shared > 1

    def settings(self) -> dict[str, float | int]:
        """The settings of work that say so."""
        values = (self.epsilon, self.delta, self.clip, self.rounds)
        named: dict[str, float | int] = dict(
            zip((EPSILON, DELTA, CLIP, ROUNDS), values, strict=True)
        )
        return named | ({SHARED: self.shared} if self.is_shared else {})

    def event(self, rate: float, steps: int) -> SampledGaussian:
        """A round of `steps` steps over Poisson samples, with the noise that all rounds need.

        Raises UsageError if no noise is enough.
        """
        noise = _noise(self.epsilon, self.delta, rate, steps * self.rounds)
        if not noise < MAX_NOISE:
            raise UsageError(
                f"no noise is enough for ε = {self.epsilon:g} in {self.rounds} rounds",
                "use a larger --dp, such as 3, or fewer rounds",
            )
        return SampledGaussian(noise, rate, steps)

    def shared_event(self, lr: float) -> SharedGaussian:
        """A round of one step over all rows, with the noise of the sum. Raises UsageError.

        `lr`: the learning rate. A row then changes the sum of updates times examples by at most
        that times the clip.
        """
        if not 0 < lr * self.clip < math.inf:
            raise UsageError("shared noise needs a learning rate above 0", "--set lr=0.5")
        return SharedGaussian(self.event(1.0, 1).noise, self.shared, lr * self.clip)


def read(settings: Mapping[str, object]) -> PrivateTraining | None:
    """What the settings of work ask for; None for training without noise. Raises UsageError."""
    if SETTINGS.isdisjoint(settings):
        return None
    epsilon, delta, clip, rounds = (
        _number(settings, name) for name in (EPSILON, DELTA, CLIP, ROUNDS)
    )
    shared = _number(settings, SHARED) if SHARED in settings else 1.0
    for name, value, low, high in (
        (EPSILON, epsilon, MIN_EPSILON, MAX_EPSILON),
        (DELTA, delta, MIN_DELTA, MAX_DELTA),
        (CLIP, clip, MIN_CLIP, MAX_CLIP),
        (ROUNDS, rounds, 1, MAX_ROUNDS),
        (SHARED, shared, 1, MAX_SHARERS),
    ):
        if not low <= value <= high:
            raise UsageError(f"{name} must be from {low:g} to {high:g}, not {value:g}", "--dp 3")
    for name, value in ((ROUNDS, rounds), (SHARED, shared)):
        if value != int(value):
            raise UsageError(f"{name} must be a whole number, not {value:g}", "--dp 3")
    return PrivateTraining(epsilon, delta, clip, int(rounds), int(shared))


def _number(settings: Mapping[str, object], name: str) -> float:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"a run with noise needs a number {name}, not {value!r}", "--dp 3")
    return float(value)


@functools.lru_cache(maxsize=64)
def _noise(epsilon: float, delta: float, rate: float, count: int) -> float:
    return accountant.noise_for(epsilon, delta, rate, count)
