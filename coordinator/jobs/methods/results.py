"""The result of a method: tables, notes and a plot of text. Pure."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from msgspec import Struct

from coordinator.jobs.analysis import GroupValues, Merged
from protocols.analytics.query import Query
from protocols.errors import CommonweightError

_T = TypeVar("_T")
_S = TypeVar("_S")
Value = float | int | str | None


class ResultTable(Struct, frozen=True):
    """Rows of values under titles. The title of the table is empty if it has none."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


class Statistics(Struct, frozen=True, kw_only=True):
    """What a method found. `label`: how many peers and rows it covers.

    `plot`: lines for a terminal. `left_out` gives the reason by peer.
    """

    method: str
    tables: tuple[ResultTable, ...]
    notes: tuple[str, ...] = ()
    plot: tuple[str, ...] = ()
    label: str = ""
    left_out: dict[str, str] = {}


class PeersLost(CommonweightError, code="peers_lost"):
    """Peers that answered the first question do not answer a later one; `reasons` by peer."""

    def __init__(self, reasons: dict[str, str]) -> None:
        why = "; ".join(dict.fromkeys(reasons.values()))
        super().__init__(
            f"peers did not answer all questions: {why}",
            "ask again if a peer was away; if peers refuse, leave out terms with missing values or "
            "rare categories: their rows have to fit those of earlier questions",
        )
        self.reasons = reasons


#: Yields questions, gets merged answers, returns the result.
Plan = Generator[Query, Merged, Statistics]


def make_table(
    columns: Iterable[str], rows: Iterable[Iterable[Value]], title: str = ""
) -> ResultTable:
    """A table. Numbers that are not finite become None."""
    return ResultTable(title, tuple(columns), tuple(tuple(map(_clean, row)) for row in rows))


def pick_states(merged: Merged, place: int, kind: type[_S]) -> dict[GroupValues, _S]:
    """The states of this kind that one operation has, by group. Withheld ones are left out."""
    found: dict[GroupValues, _S] = {}
    for group, (_, states) in merged.cells.items():
        state = states[place]
        if isinstance(state, kind):
            found[group] = state
    return found


def batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """The items in order, at most `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _clean(value: Value) -> Value:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
