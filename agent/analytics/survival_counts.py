"""Counts of events by time, in bins of enough rows. Pure.

Bins end at 64ths of a power of 2, the middle first, so the bins of two peers fit together. In each
bin both counts, of rows with the event and of rows without, are 0 or not few.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from agent.analytics.compute import Places, Table
from agent.analytics.figures import WITHHELD, Figure, ToldRows, leave_out
from protocols.analytics.mergeable_states import Floats
from protocols.analytics.model_states import SurvivalState
from protocols.analytics.models import MAX_BINS
from protocols.analytics.query import Operation
from protocols.analytics.row_sets import time_bin

#: Coarser bins begin at multiples of these 64ths.
_STEPS = (4, 8, 16)


def count_in_turn(
    operation: Operation,
    table: Table,
    cells: Sequence[Places],
    min_rows: int,
    earlier: Sequence[Sequence[float]],
) -> Iterator[list[Figure]]:
    """The counts of the cells: in as many bins as have enough rows, then in bins of earlier answers
    alone, then in fewer and fewer of the newest."""
    width = operation.args[0] / MAX_BINS
    known = [{int(at / width) for at in edges if (at / width).is_integer()} for edges in earlier]
    coarser = [
        {start for start in one if start % step == 0} for one in known[:1] for step in _STEPS
    ]
    for among in [{*range(MAX_BINS)}, *known, *coarser]:
        yield _count_survival(operation, table, cells, min_rows, among)


def _count_survival(
    operation: Operation,
    table: Table,
    cells: Sequence[Places],
    min_rows: int,
    among: Collection[int],
) -> list[Figure]:
    """The events and the censored rows of each cell, in the same time bins, which start `among`
    these 64ths.

    An event is 1 or 0; others count as missing.
    """
    time, event = (table.numbers(name) for name in operation.columns)
    gone = ~((time >= 0) & ((event == 0) | (event == 1)))
    width = operation.args[0] / MAX_BINS
    unit = np.minimum(np.where(gone, 0, time) / width, MAX_BINS - 1).astype(np.int64)
    used = [leave_out(rows, gone[rows], bool(gone.any()), min_rows) for rows in cells]
    counts = [_count(unit[rows], event[rows]) for rows in used]
    enough = [bool(c.any()) and not _is_few(c.sum(1), min_rows) for c in counts]
    if not any(enough):
        return [WITHHELD] * len(cells)
    # Bins of groups are unions of those of the table, so several questions divide no bin further.
    possible = _divide(_count(unit[~gone], event[~gone]), min_rows, among)
    told = np.concatenate([c for c, is_told in zip(counts, enough, strict=True) if is_told])
    starts = _divide(told, min_rows, possible)
    edges = tuple(start * width for start in starts[1:])
    bin_of = np.searchsorted(starts, unit, side="right") - 1
    return [
        _figure(rows, np.add.reduceat(c, starts, axis=1), edges, bin_of, event)
        if is_told
        else WITHHELD
        for rows, c, is_told in zip(used, counts, enough, strict=True)
    ]


def _count(unit: Places, event: Floats) -> Places:
    """Rows with the event and without, int64[2, MAX_BINS]."""
    return np.stack([np.bincount(unit[event == e], minlength=MAX_BINS) for e in (1, 0)])


def _figure(
    rows: Places, counts: Places, edges: tuple[float, ...], bin_of: Places, event: Floats
) -> Figure:
    parts = {
        time_bin(bool(e), start): rows[(bin_of[rows] == place) & (event[rows] == e)]
        for (place, start), e in itertools.product(enumerate((0.0, *edges)), (1, 0))
    }
    state = SurvivalState(edges, tuple(counts[0].tolist()), tuple(counts[1].tolist()))
    return Figure(state, tuple(ToldRows("", part) for part in parts.values() if len(part)), parts)


def _divide(counts: Places, min_rows: int, possible: Collection[int]) -> list[int]:
    """Where the bins start: in the middle first, then in the middles of the halves.

    A start is left out if it would leave few rows, with the event or without, on a side.
    """
    before = np.concatenate([np.zeros((len(counts), 1), np.int64), counts.cumsum(1)], axis=1)
    ends = [0, MAX_BINS]
    step = MAX_BINS // 2
    while step:
        for middle in range(step, MAX_BINS, 2 * step):
            if middle not in possible:
                continue
            place = bisect_left(ends, middle)
            left = before[:, middle] - before[:, ends[place - 1]]
            right = before[:, ends[place]] - before[:, middle]
            if left.any() and right.any() and not _is_few(np.stack([left, right]), min_rows):
                ends.insert(place, middle)
        step //= 2
    return ends[:-1]


def _is_few(counts: Places, min_rows: int) -> bool:
    return bool(((counts > 0) & (counts < min_rows)).any())
