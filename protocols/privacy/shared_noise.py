"""Noise that the peers of a secure sum add together: what one peer adds, and what the plan needs.

A peer's update times its examples is -lr · (sum of clipped gradients + noise), so a row of any peer
moves the sum of these by at most lr · clip. Each of `peers` honest ones adds noise of that times
σ/√peers. docs/notes/shared-noise.md has the reasoning. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from protocols.privacy.events import MAX_SHARERS, SharedGaussian

#: No element of the noise is further from 0 than this many standard deviations: the generator has
#: 53 bits, and sqrt(2 · 54 · ln 2) is 8.66.
_FARTHEST = 9.0
#: The norm of n elements is above sqrt(n) and this many with a probability below e^-50.
_NORM_SLACK = 10.0
#: The fewest steps of rounding in a standard deviation of one peer's noise.
MIN_STEPS = 8.0
#: Float32 rounds what is compared with an exact bound.
SLACK = 1.001


class SharedNoise(Struct, frozen=True, kw_only=True):
    """What a peer has added to its update times its examples.

    `peers`: the number of honest ones whose noise is enough together. `row`: the most that one row
    changes (the learning rate times the clip). `std`: the standard deviation of this peer's noise
    in each element.
    """

    peers: Annotated[int, Meta(ge=2, le=MAX_SHARERS)]
    row: Annotated[float, Meta(gt=0)]
    std: Annotated[float, Meta(gt=0)]

    @classmethod
    def of(cls, event: SharedGaussian) -> SharedNoise:
        """What a trainer has added in one step, by the event that it reports."""
        std = event.noise * event.row / math.sqrt(event.peers)
        return cls(peers=event.peers, row=event.row, std=std)

    def largest(self, examples: int) -> float:
        """The largest element that an honest update times its examples can have."""
        return SLACK * (examples * self.row + _FARTHEST * self.std)

    def longest(self, examples: int, size: int) -> float:
        """The largest norm of that, with `size` elements."""
        noise = self.std * (math.sqrt(size) + _NORM_SLACK)
        return SLACK * (examples * self.row + noise)

    def objection(
        self,
        examples: int,
        divisor: float,
        sizes: Sequence[int],
        limits: Sequence[float],
        clip: float,
        most: int,
    ) -> str:
        """Why a plan would spoil the noise of a peer with `examples`; empty if it would not.

        The sum is over updates times examples / `divisor`. `limits`: the largest element of each
        tensor, as the integer `most`. `clip`: the largest norm.
        """
        if not 0 < divisor < math.inf:
            return "it has no divisor"
        largest = self.largest(examples) / divisor
        if not all(limit >= largest for limit in limits):
            return f"a limit is below {largest:.4g}, so elements with noise would be clipped"
        if not clip >= (longest := self.longest(examples, sum(sizes)) / divisor):
            return f"its norm is below {longest:.4g}, so an update with noise would be scaled down"
        if not all(MIN_STEPS * limit / most <= self.std / divisor for limit in limits):
            return "its integers are too coarse for the noise of one peer"
        return ""
