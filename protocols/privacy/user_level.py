"""Noise in the versions of a run, for whole peers: the settings of a run, and its cost so far.

The coordinator clips the change of each peer, adds them up, adds Gaussian noise and divides by a
number of peers that was fixed before (McMahan et al. 2018, arXiv 1710.06963, with every peer in
every round). Neighbours are two runs in one of which a peer's changes are all zeros. Pure.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from protocols.errors import UsageError
from protocols.privacy import accountant, gaussian
from protocols.privacy.events import MAX_NOISE

#: With fewer peers, the noise that is left after the division usually hides the model.
FEW_PEERS = 100


class PrivateVersions(NamedTuple):
    """`rounds` versions together cost at most (`epsilon`, `delta`) for each peer."""

    epsilon: float
    delta: float
    rounds: int

    @property
    def noise(self) -> float:
        """The noise of the sum of a round: its standard deviation over the clip norm.

        Raises UsageError if no noise is enough.
        """
        noise = _noise(self.epsilon, self.delta, self.rounds)
        if not noise < MAX_NOISE:
            raise UsageError(
                f"no noise is enough for ε = {self.epsilon:g} in {self.rounds} rounds",
                "use a larger --dp-user, such as 3, or fewer rounds",
            )
        return noise

    def epsilon_of(self, versions: int) -> float:
        """The ε of this many versions."""
        return gaussian.epsilon_of(math.sqrt(versions) / self.noise, self.delta)


@functools.lru_cache(maxsize=64)
def _noise(epsilon: float, delta: float, rounds: int) -> float:
    return accountant.noise_for(epsilon, delta, 1.0, rounds)
