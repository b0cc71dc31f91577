"""The table of operations. Each changes the model and returns its deed on the real fleet.

Choices are made with `choose`, and only from the model, so that a sequence can be planned without a
fleet and played again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import Model

T = TypeVar("T")
Deed = Callable[[JourneyFleet], None]
#: Chooses one of a sequence.
Choose = Callable[[Sequence[T]], T]


class Operation(NamedTuple):
    name: str
    is_possible: Callable[[Model], bool]
    apply: Callable[[Model, Choose], Deed]


OPERATIONS: dict[str, Operation] = {}


def operation(
    is_possible: Callable[[Model], bool],
) -> Callable[[Callable[[Model, Choose], Deed]], Callable[[Model, Choose], Deed]]:
    """Register an operation that is possible in these states of the model."""

    def register(apply: Callable[[Model, Choose], Deed]) -> Callable[[Model, Choose], Deed]:
        name = apply.__name__.replace("_", " ")
        OPERATIONS[name] = Operation(name, is_possible, apply)
        return apply

    return register


def ignore(value: object) -> None:
    """A deed returns nothing."""
