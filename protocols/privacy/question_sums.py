"""Answers to secure questions (`analyze --secure`) as integers that peers mask and add up. Pure.

Each peer turns its answer into the sums of the layout (`question_layout`).

A sum is a fixed-point integer modulo 2^256, with 128 bits after the point. So no scale depends on
the data, a sum of 1,024 peers never wraps, and each peer rounds each of its sums by at most 2^-129.
Means and variances follow exactly from the sums of values and squares.
"""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from protocols.analytics.mergeable_states import PeerAnswer, State, WithheldState
from protocols.analytics.model_states import (
    LevelsState,
)
from protocols.analytics.query import Query
from protocols.errors import BadMessage, CohortLost, Refused
from protocols.privacy.question_layout import (
    MAX_NUMBERS,
    Group,
    Layout,
    items_of,
    told_by,
    truth_of,
)
from protocols.privacy.question_states import count_of, state_of, sums_of
from protocols.privacy.secagg.messages import MAX_COHORT, MaskAnswer

Words = npt.NDArray[np.uint64]

#: Bits after the point, and 64-bit words of a number.
FRACTION_BITS, WORDS = 128, 4
#: The sum of `MAX_COHORT` numbers below this fits into the ring, with its sign.
MAX_SIZE = Fraction(2 ** (64 * WORDS - 2 - FRACTION_BITS), MAX_COHORT)
#: What a peer rounds each of its sums by, at most.
ROUNDING = 2.0 ** -(FRACTION_BITS + 1)


class MaskedAnswer(Struct, frozen=True, kw_only=True):
    """The answer to the step mask, with the masked numbers."""

    answer: MaskAnswer
    numbers: Annotated[bytes, Meta(max_length=8 * WORDS * MAX_NUMBERS)]


def encode(query: Query, layout: Layout, peer: str, answer: PeerAnswer) -> Words:
    """A peer's sums, uint64[n, WORDS]. Raises BadMessage, and Refused for a sum that is too large.

    Refused does not say how large it is.
    """
    items = items_of(query, layout)
    cells = {cell.group: cell for cell in answer.cells}
    told = told_by(layout, peer, len(items))
    # Else a sum with a number of this peer, less one without it, would be the number.
    by_anybody = np.any([told_by(layout, one, len(items)) for one in layout.told], axis=0)
    if (told != truth_of(query, layout, answer) & by_anybody).any():
        raise BadMessage("the layout of the sums does not say what this peer tells")
    numbers: list[Fraction] = []
    for item, is_told in zip(items, told, strict=True):
        if not is_told:
            numbers += [Fraction()] * item.size
        elif item.place < 0:
            numbers.append(Fraction(cells[item.group].rows))
        else:
            state = cells[item.group].states[item.place]
            numbers += sums_of(state, item.level, layout.edges[item.place])
    if any(abs(number) >= MAX_SIZE for number in numbers):
        raise Refused(
            f"a sum of this peer is {float(MAX_SIZE):.0e} or more, which is too large to be masked",
            "ask about the column in larger units",
        )
    words = b"".join(
        (round(number * 2**FRACTION_BITS) % 2 ** (64 * WORDS)).to_bytes(8 * WORDS, "little")
        for number in numbers
    )
    return np.frombuffer(words, "<u8").reshape(-1, WORDS).astype(np.uint64)


def decode(
    query: Query, layout: Layout, totals: Words, peers: Collection[str]
) -> dict[Group, tuple[int, tuple[State, ...]]]:
    """By group, the rows and the states of these peers together, from the unmasked sums.

    Raises CohortLost for sums that honest peers cannot have sent.
    """
    items = items_of(query, layout)
    told = np.any([told_by(layout, peer, len(items)) for peer in peers], axis=0)
    numbers = iter(_to_fractions(totals))
    rows: dict[Group, int] = {}
    states: dict[Group, dict[int, State]] = {group: {} for group in layout.groups}
    bins: dict[tuple[Group, int], list[Fraction]] = {}
    shown: set[tuple[Group, int]] = set()
    try:
        for item, is_told in zip(items, told, strict=True):
            some = iter([next(numbers) for _ in range(item.size)])
            found = states[item.group]
            if item.place < 0:
                rows[item.group] = count_of(some)
            elif query.operations[item.place].kind == "histogram":
                bins.setdefault((item.group, item.place), []).extend(some)
                if is_told:
                    shown.add((item.group, item.place))
            elif item.level:
                old = found.get(item.place, LevelsState())
                assert isinstance(old, LevelsState)
                counts = old.counts | ({item.level: count} if (count := count_of(some)) else {})
                found[item.place] = LevelsState(counts)
            elif is_told:
                operation, edges = query.operations[item.place], layout.edges[item.place]
                found[item.place] = state_of(operation, edges, some, len(edges))
        for group, place in shown:
            in_order = iter(bins[group, place])
            states[group][place] = state_of(query.operations[place], (), in_order, 0)
    except (ValueError, OverflowError) as err:
        raise CohortLost(
            f"the sum of the answers is none that honest peers can have sent: {err}",
            "ask again; if it happens again, ask fewer peers",
        ) from err
    places = range(len(query.operations))
    return {
        group: (rows[group], tuple(states[group].get(place, WithheldState()) for place in places))
        for group in layout.groups
    }


def _to_fractions(totals: Words) -> list[Fraction]:
    found = []
    for row in np.ascontiguousarray(totals, "<u8"):
        number = int.from_bytes(row.tobytes(), "little", signed=True)
        found.append(Fraction(number, 2**FRACTION_BITS))
    return found
