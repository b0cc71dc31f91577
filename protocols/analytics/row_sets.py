"""Which sets of rows of a peer are alike, without the rows. Pure.

A peer numbers sets of its rows that do not follow from each other. It tells each other set as a sum
of these, each times a factor modulo `PRIME`: if women are set 1 and men are set 2, all rows are
{1: 1, 2: 1}. So others see which of its sets are equal, or sums and differences of others. They see
no row and no number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from msgspec import Meta

from protocols.messages.envelope import Text

#: Factors are numbers of the field of this size.
PRIME = (1 << 31) - 1
#: Sets that a peer numbers.
MAX_ROW_SETS = 1024
RowSet = Annotated[
    dict[Annotated[int, Meta(ge=0, lt=MAX_ROW_SETS)], Annotated[int, Meta(ge=1, lt=PRIME)]],
    Meta(max_length=MAX_ROW_SETS),
]
_CATEGORY = "category "
#: The rows of a figure, "": those that it sums over. Of counts by category or time, those of each.
#: `ones`: of a column of zeros and ones, those with 1.
FigureRows = Annotated[dict[Text, RowSet], Meta(max_length=1024)]


def add(sets: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The union of sets that have no row in common."""
    total: dict[int, int] = {}
    for one in sets:
        for number, factor in one.items():
            total[number] = (total.get(number, 0) + factor) % PRIME
    return {number: factor for number, factor in total.items() if factor}


def ones(place: int) -> str:
    """The label of the rows with 1 in a column of zeros and ones, the column of a figure at this
    place: the sum of this column is their number, and a covariance has their sum of the other."""
    return f"ones {place}"


def category(place: int, code: int) -> str:
    """The label of the rows of a category of a model: level `code` of the term at this place."""
    return f"{_CATEGORY}{place} {code}"


def is_category(label: str) -> bool:
    return label.startswith(_CATEGORY)


def time_bin(event: bool, start: float) -> str:
    """The label of the rows with the event, or without, in a time bin that starts then."""
    return f"{int(event)} {start!r}"


def read_time_bin(label: str) -> tuple[bool, float] | None:
    """Whether it is of rows with the event, and the start; None for another label."""
    event, _, start = label.partition(" ")
    try:
        return event == "1", float(start)
    except ValueError:
        return None
