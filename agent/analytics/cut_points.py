"""The numbers that conditions and bins may compare with: never two with few rows between. Pure.

Whether an answer is released depends on the sizes of its cells. A requester who could choose any
threshold would find by bisection where a cell loses a row, which is that row's value: `salary < x`
for five persons is answered from the largest of their salaries on. The thresholds of all questions
divide a table into parts of at least `min_rows` rows. A threshold that would make a smaller part is
replaced by another one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from protocols.analytics.mergeable_states import Floats
from protocols.errors import Refused

#: The most different thresholds for one column. Each may say whether a part has enough rows.
MAX_THRESHOLDS = 512


class CutPoints:
    """The cuts of one column: rows with values below a cut are divided from the others.

    `values`: float64[n], the table's values in any order, NaN where missing. `cuts` were used,
    `asked` are all thresholds of earlier questions; `remember(threshold, is_cut)` records new ones.
    """

    def __init__(
        self,
        name: str,
        values: Floats,
        min_rows: int,
        cuts: Sequence[float] = (),
        asked: Sequence[float] = (),
        remember: Callable[[float, bool], None] = lambda threshold, is_cut: None,
    ) -> None:
        self._name, self._min_rows, self._remember = name, min_rows, remember
        self._values = np.sort(values[~np.isnan(values)])
        self._cuts = [-math.inf, *sorted(cuts), math.inf]
        self._asked = {*asked}
        self.moved = False

    def cut(self, threshold: float) -> float:
        """The cut that is used for a threshold; `moved` is set if it is another one.

        Raises Refused after too many thresholds.
        """
        place = bisect_left(self._cuts, threshold)
        if self._cuts[place] == threshold:
            return threshold
        if threshold not in self._asked and len(self._asked) >= MAX_THRESHOLDS:
            raise Refused(
                f"column {self._name!r} was compared with {MAX_THRESHOLDS} different numbers, and "
                "is compared with no new ones",
                "compare with a number of an earlier question",
            )
        low, high = self._cuts[place - 1], self._cuts[place]
        below, above = self._rows(low, threshold), self._rows(threshold, high)
        is_cut = min(below, above) >= self._min_rows
        if threshold not in self._asked or is_cut:
            self._asked.add(threshold)
            self._remember(threshold, is_cut)
        if is_cut:
            insort(self._cuts, threshold)
            return threshold
        self.moved = True
        if below + above < 2 * self._min_rows:
            # No threshold can divide these rows, so the choice must not depend on their values.
            return low if math.isinf(high) or threshold - low <= high - threshold else high
        return low if below < self._min_rows else high

    def edges(self, low: float, high: float, bins: int) -> Floats:
        """The edges of equal bins, float64[bins + 1], each at a cut. Raises Refused."""
        wanted = np.linspace(low, high, bins + 1)
        wanted[-1] = math.nextafter(high, math.inf)  # the last bin includes its upper edge
        new = {float(edge) for edge in wanted} - self._asked - {*self._cuts}
        if len(self._asked) + len(new) > MAX_THRESHOLDS:
            raise Refused(
                f"the bins need {len(new)} more numbers to compare column {self._name!r} with, and "
                f"{MAX_THRESHOLDS} are the most",
                "ask for fewer bins, or for those of an earlier question",
            )
        found = np.empty_like(wanted)
        for place in _by_halves(len(wanted)):
            found[place] = self.cut(float(wanted[place]))
        return np.maximum.accumulate(found)

    def _rows(self, low: float, high: float) -> int:
        """The number of rows with a value from `low` to below `high`."""
        first, last = np.searchsorted(self._values, (low, high))
        return int(last - first)


def _by_halves(count: int) -> list[int]:
    """The numbers below `count`: both ends, the middle, the middles of the halves and so on."""
    order, todo = [0, count - 1], [(0, count - 1)]
    for first, last in todo:
        if last - first > 1:
            middle = (first + last) // 2
            order.append(middle)
            todo += [(first, middle), (middle, last)]
    return order
