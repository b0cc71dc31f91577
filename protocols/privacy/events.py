"""Events that cost privacy: each is one answer, or several alike, about the same rows. Pure.

A ledger stores events, not ε, because their cost together is less than the sum of their costs.
Neighbours are two tables of which one has one row more, or one row replaced by zeros.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

#: More rounds than a run can have, times more steps than a round can have.
MAX_COUNT = 10**9
#: Less noise costs more than 10⁶ in ε, which is no protection; more is a mistake.
MIN_NOISE, MAX_NOISE = 1e-3, 1e9
#: The most peers that a noise can be shared by: those of the largest secure sum.
MAX_SHARERS = 1024
_Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
_Noise = Annotated[float, Meta(ge=MIN_NOISE, le=MAX_NOISE)]
_Epsilon = Annotated[float, Meta(ge=0, le=1e6)]


class Event(Struct, frozen=True, tag=True):
    """`count` answers of one kind. The ledger names its kind by the class."""


class Gaussian(Event, frozen=True):
    """Sums with Gaussian noise. `noise`: standard deviation over what one row changes."""

    noise: _Noise
    count: _Count = 1


class SampledGaussian(Event, frozen=True):
    """The same over a Poisson sample: each row is in it with probability `rate`, in each step."""

    noise: _Noise
    rate: Annotated[float, Meta(gt=0, le=1)]
    count: _Count = 1


class SharedGaussian(Event, frozen=True):
    """Sums with Gaussian noise that `peers` honest peers have added together, each an equal part.

    `row`: what one row changes, in the unit of the sum.
    """

    noise: _Noise
    peers: Annotated[int, Meta(ge=2, le=MAX_SHARERS)]
    row: Annotated[float, Meta(gt=0, le=1e12)] = 1.0
    count: _Count = 1


class Laplace(Event, frozen=True):
    """Numbers with Laplace noise of the scale 1/`epsilon` over what one row changes."""

    epsilon: _Epsilon
    count: _Count = 1


class DiscreteLaplace(Event, frozen=True):
    """Counts with discrete Laplace noise. No other answer that costs `epsilon` alone costs more
    together with others, so this also stands for any such answer."""

    epsilon: _Epsilon
    count: _Count = 1


class Failure(Event, frozen=True):
    """With at most this probability, an answer tells anything."""

    delta: Annotated[float, Meta(ge=0, le=1)]


class Exact(Event, frozen=True):
    """Something left without noise: there is no bound."""

    count: _Count = 1


encode: Callable[[tuple[Event, ...]], bytes] = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(
    tuple[functools.reduce(operator.or_, Event.__subclasses__()), ...]  # type: ignore[misc]
).decode


def decode(data: bytes | str) -> tuple[Event, ...]:
    """The events in a ledger's entry. Raises msgspec.ValidationError."""
    found: tuple[Event, ...] = _decode(data)
    return found
