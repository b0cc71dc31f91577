"""Which sets of rows of a peer are alike, without the rows. Pure.

A peer numbers sets of its rows that do not follow from each other. It sends each other set as a sum
of these, each times a factor modulo `PRIME`: if women are set 1 and men are set 2, all rows are {1:
1, 2: 1}. So others see which of its sets are equal, or sums and differences of others. They see no
row and no number of rows.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from msgspec import Meta

from protocols.messages.envelope import Text

#: Factors are numbers of the field of this size.
PRIME = (1 << 31) - 1
#: The most sets in one row set, and the bound of their numbers.
MAX_ROW_SETS, MAX_NUMBER = 1024, 1 << 31
RowSet = Annotated[
    dict[Annotated[int, Meta(ge=0, lt=MAX_NUMBER)], Annotated[int, Meta(ge=1, lt=PRIME)]],
    Meta(max_length=MAX_ROW_SETS),
]
_PART = "part "
#: In the label of a part: the parts of a Cox model's rows by time.
TIME = "time"
#: The row sets of a figure, by label: "" for the rows that it sums over, and one label for each
#: category or time bin that it counts. `ones`: the rows with 1 in a column of zeros and ones.
FigureRows = Annotated[dict[Text, RowSet], Meta(max_length=1024)]


def add(sets: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The union of sets that have no row in common."""
    total: dict[int, int] = {}
    for one in sets:
        for number, factor in one.items():
            total[number] = (total.get(number, 0) + factor) % PRIME
    return {number: factor for number, factor in total.items() if factor}


def ones(place: int) -> str:
    """The label of the rows with 1 in a column of zeros and ones, at this place in a figure.

    The sum of the column tells the number of these rows, and a covariance tells their sum of the
    other column.
    """
    return f"ones {place}"


def part_of(of: str, number: int) -> str:
    """The label of a part of a model's rows over which it has sums.

    The part is level `number` of the term at the place `of`, a combination of levels of several
    terms ("0&2"), or time part `number` of a Cox model.
    """
    return f"{_PART}{of} {number}"


def read_part(label: str) -> str | None:
    """What the label is a part of; None for another label."""
    return label[len(_PART) :].rpartition(" ")[0] if label.startswith(_PART) else None


def time_bin(event: bool, start: float) -> str:
    """The label of the rows with the event, or without, in a time bin that starts then."""
    return f"{int(event)} {start!r}"


def by_bin(rows: FigureRows, edges: Sequence[float]) -> FigureRows:
    """The rows with the event in each of these time bins, then those without, by number. They are
    unions of the rows in the peer's own bins."""
    parts: list[list[RowSet]] = [[] for _ in range(2 * (len(edges) + 1))]
    for label, some in rows.items():
        event, _, start = label.partition(" ")
        with contextlib.suppress(ValueError):  # of another figure
            number = bisect_right(edges, float(start))
            parts[number + (0 if event == "1" else len(edges) + 1)].append(some)
    return {str(n): add(some) for n, some in enumerate(parts) if some}


def join_bins(
    edges: Sequence[float], groups: Sequence[Sequence[FigureRows]], minimum: int
) -> list[float]:
    """The edges that remain when bins of too few peers are joined.

    In each group, a bin then has rows with the event at `minimum` peers or more, or at none. The
    same holds for rows without the event. `groups`: by group, the rows of each peer.
    """
    left = [*edges]
    while left:
        bins = len(left) + 1
        few = [
            number % bins
            for told in ([by_bin(rows, left) for rows in peers] for peers in groups)
            for number in range(2 * bins)
            if 0 < sum(bool(one.get(str(number))) for one in told) < minimum
        ]
        if not few:
            break
        del left[min(few[0], len(left) - 1)]
    return left
