"""Answers to secure questions (`analyze --secure`) as integers that peers mask and add up. Pure.

Peers first tell the shape of their answers: which groups, categories and time bins they have, and
which figures they do not tell; no number. The shapes agree on a layout: the sums that are computed,
and which peer is part of each. Then each peer turns its answer into those sums.

A sum is a fixed-point integer modulo 2^256, with 128 bits after the point. So no scale depends on
the data, a sum of 1,024 peers never wraps, and each peer rounds each of its sums by at most 2^-129.
Means and variances follow exactly from the sums of values and squares.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, Meta, Struct
from msgspec.structs import replace

from protocols.analytics import mergeable_states as stats
from protocols.analytics.mergeable_states import Cell, PeerAnswer, State, WithheldState
from protocols.analytics.model_states import (
    MAX_TOLD_LEVELS,
    ColumnsState,
    FitState,
    LevelsState,
    RiskState,
    SurvivalState,
    coarsen,
    upper_size,
)
from protocols.analytics.models import MAX_EDGES
from protocols.analytics.query import Operation, Query
from protocols.errors import BadMessage, CohortLost, Refused, UsageError
from protocols.messages.envelope import Id, Text
from protocols.privacy.secagg.messages import MAX_COHORT, MaskAnswer, Peers
from protocols.tables.statistics import Finite, Moments

Words = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.bool_]
Group = tuple[str | None, ...]

#: Bits after the point, 64-bit words of a number, and numbers of an answer.
FRACTION_BITS, WORDS, MAX_NUMBERS = 128, 4, 16_384
#: The sum of `MAX_COHORT` numbers below this fits into the ring, with its sign.
MAX_SIZE = Fraction(2 ** (64 * WORDS - 2 - FRACTION_BITS), MAX_COHORT)
#: What a peer rounds each of its sums by, at most.
ROUNDING = 2.0 ** -(FRACTION_BITS + 1)
#: Why these operations have no sums.
_NO_SUMS = {
    "quantile": "buckets of values of each peer; ask for histogram(c, bins, least, most)",
    "distinct": "numbers of different values, which do not add up",
    "min": "values of single rows",
    "max": "values of single rows",
    "estimates": "the estimate of each peer alone",
}


class Shape(Struct, frozen=True, kw_only=True):
    """What a peer tells before a secure question: its answer with 0 in place of all numbers.

    `together`: the sets of peers with which it has answered questions about the same columns.
    `minimum`: the fewest trusted peers of a sum, with this one.
    """

    answer: PeerAnswer
    together: Annotated[tuple[Peers, ...], Meta(max_length=16)] = ()
    minimum: Annotated[int, Meta(ge=0, le=1 << 32)] = 0


class Layout(Struct, frozen=True, kw_only=True):
    """The sums of a question, the same for all peers.

    `levels`, `edges`: by operation, the categories of `levels` and the time bins of `survival`.
    `told`: by peer, the bits of the items that it is part of, eight to a byte.
    """

    groups: Annotated[
        tuple[Annotated[tuple[Text | None, ...], Meta(max_length=3)], ...], Meta(max_length=2000)
    ]
    levels: Annotated[
        tuple[Annotated[tuple[Text, ...], Meta(max_length=4 * MAX_TOLD_LEVELS)], ...],
        Meta(max_length=32),
    ]
    edges: Annotated[
        tuple[Annotated[tuple[Finite, ...], Meta(max_length=MAX_EDGES)], ...], Meta(max_length=32)
    ]
    told: Annotated[
        dict[Id, Annotated[bytes, Meta(max_length=MAX_NUMBERS)]], Meta(max_length=MAX_COHORT)
    ]


class MaskedAnswer(Struct, frozen=True, kw_only=True):
    """The answer to the step mask, with the masked numbers."""

    answer: MaskAnswer
    numbers: Annotated[bytes, Meta(max_length=8 * WORDS * MAX_NUMBERS)]


class _Item(NamedTuple):
    """Numbers that are told or not: the rows of a group, a figure, or the rows of a category.

    `place`: of the operation; -1 for the rows of the group. `size`: how many numbers.
    """

    group: Group
    place: int
    level: str
    size: int


def check(query: Query) -> None:
    """Raise UsageError unless the question has sums of all peers."""
    for operation in query.operations:
        is_sketch = operation.kind == "histogram" and len(operation.args) < 3
        if is_sketch or operation.kind in _NO_SUMS:
            why = _NO_SUMS["quantile" if is_sketch else operation.kind]
            raise UsageError(f"{operation} has no answer with --secure: it needs {why}")
    if query.epsilon:
        raise UsageError("a secure question has no noise", "leave --epsilon or --secure out")


def names_only(query: Query) -> bool:
    """True if the shapes are the whole answer."""
    return all(operation.kind == "columns" for operation in query.operations)


def read_shape(data: bytes) -> Shape:
    """Raises BadMessage."""
    try:
        return msgspec.json.decode(data, type=Shape)
    except msgspec.DecodeError as err:
        raise BadMessage(f"not the shape of an answer: {err}") from err


# --- shapes ----------------------------------------------------------------------------------


def shape_of(query: Query, answer: PeerAnswer) -> PeerAnswer:
    """The answer without numbers."""
    cells = tuple(
        Cell(cell.group, 0, tuple(map(_empty, query.operations, cell.states)))
        for cell in answer.cells
    )
    return replace(answer, rows=0, cells=cells)


def _empty(operation: Operation, state: State) -> State:
    match state:
        case WithheldState() | ColumnsState():
            return state
        case LevelsState(counts):
            return LevelsState(dict.fromkeys(counts, 0))
        case SurvivalState(edges):
            return _decode(operation, edges, iter(()), len(edges))
    return _decode(operation, (), iter(()), 0)


def agree_layout(query: Query, shapes: Mapping[str, PeerAnswer], minimum: int) -> Layout:
    """The sums that at least `minimum` peers are part of. Raises Refused if there are none."""
    cells = {peer: {cell.group: cell for cell in answer.cells} for peer, answer in shapes.items()}
    having = Counter(group for found in cells.values() for group in found)
    groups = tuple(
        sorted(
            (group for group, count in having.items() if count >= minimum),
            key=lambda values: [(v is None, v or "") for v in values],
        )
    )
    if not groups:
        raise Refused(f"no group has enough rows at {minimum} peers or more")
    levels: list[tuple[str, ...]] = []
    edges: list[tuple[float, ...]] = []
    for place in range(len(query.operations)):
        states = [found[g].states[place] for found in cells.values() for g in groups if g in found]
        names = {n: None for s in states if isinstance(s, LevelsState) for n in s.counts}
        levels.append(tuple(sorted(names)))
        bins = [set(s.edges) for s in states if isinstance(s, SurvivalState)]
        edges.append(tuple(sorted(set.intersection(*bins))) if bins else ())
    layout = Layout(groups=groups, levels=tuple(levels), edges=tuple(edges), told={})
    truth = {peer: truth_of(query, layout, answer) for peer, answer in shapes.items()}
    enough = np.stack([*truth.values()]).sum(axis=0) >= minimum
    told = {peer: np.packbits(bits & enough).tobytes() for peer, bits in truth.items()}
    return replace(layout, told=told)


def _items(query: Query, layout: Layout) -> list[_Item]:
    """The items in the order of their numbers. Raises BadMessage for a layout of another query."""
    if {len(layout.levels), len(layout.edges)} != {len(query.operations)} or any(
        len(group) != len(query.by) for group in layout.groups
    ):
        raise BadMessage("the layout of the sums is of another question")
    items = []
    for group in layout.groups:
        items.append(_Item(group, -1, "", 1))
        for place, operation in enumerate(query.operations):
            if operation.kind == "levels":
                items += [_Item(group, place, level, 1) for level in layout.levels[place]]
            else:
                items.append(_Item(group, place, "", _size(operation, len(layout.edges[place]))))
    if (count := sum(item.size for item in items)) > MAX_NUMBERS:
        raise Refused(
            f"the answer has {count:,} numbers, and a secure sum has at most {MAX_NUMBERS:,}",
            "ask about fewer groups, columns or terms",
        )
    return items


def _size(operation: Operation, edges: int) -> int:
    """The numbers of a figure."""
    width = 0 if operation.model is UNSET else len(operation.model.at)
    bins = 1 if operation.model is UNSET else len(operation.model.edges) + 1
    match operation.kind:
        case "count" | "missing" | "columns":
            return 1
        case "cov" | "corr":
            return 6
        case "histogram":
            return int(operation.args[0]) + 2
        case "survival":
            return 2 * (edges + 1)
        case "glm":
            return 4 + width + upper_size(width)
        case "cox":
            return 2 * bins + width + 2 * bins * (1 + width + upper_size(width))
    return 3


def truth_of(query: Query, layout: Layout, answer: PeerAnswer) -> Bits:
    """Which items this answer has, bool[items]. Raises BadMessage, Refused."""
    cells = {cell.group: cell for cell in answer.cells}

    def has(item: _Item) -> bool:
        if (cell := cells.get(item.group)) is None:
            return False
        if item.place < 0:
            return True
        state = cell.states[item.place]
        if isinstance(state, LevelsState):
            return item.level in state.counts
        return not isinstance(state, WithheldState)

    return np.array([has(item) for item in _items(query, layout)], bool)


def told_by(layout: Layout, peer: str, items: int) -> Bits:
    """Which items the sums have of a peer, bool[items]. Raises BadMessage."""
    packed = np.frombuffer(layout.told.get(peer, b""), np.uint8)
    if len(packed) != -(-items // 8):
        raise BadMessage(f"the layout of the sums does not say what {peer} is part of")
    return np.unpackbits(packed, count=items).astype(bool)


def fewest_together(query: Query, layout: Layout, me: str, among: Collection[str]) -> int:
    """Over the items that this peer is part of: the fewest peers `among` these that are, too."""
    count = len(_items(query, layout))
    mine = told_by(layout, me, count)
    bits = [told_by(layout, peer, count) for peer in among if peer in layout.told]
    total = np.sum([np.zeros(count, bool), *bits], axis=0, dtype=np.int64).reshape(count)
    return int(total[mine].min(initial=MAX_COHORT))


def terms(query: Query, layout: bytes) -> str:
    """The digest of what all peers of a sum answer alike: the question and the encoded layout."""
    sha = hashlib.sha256(msgspec.json.encode(query))
    return hashlib.sha256(sha.digest() + hashlib.sha256(layout).digest()).hexdigest()


# --- sums ------------------------------------------------------------------------------------


def encode(query: Query, layout: Layout, peer: str, answer: PeerAnswer) -> Words:
    """A peer's sums, uint64[n, WORDS]. Raises BadMessage, and Refused for a sum that is too large.

    Refused does not say how large it is.
    """
    items = _items(query, layout)
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
            numbers += _sums(state, item.level, layout.edges[item.place])
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


def _sums(state: State, level: str, edges: tuple[float, ...]) -> list[Fraction]:
    """The sums of a state, which add up over peers."""
    found: Sequence[float | Fraction]
    match state:
        case stats.CountState(count):
            found = [count]
        case stats.MomentsState(moments):
            found = [moments.count, *_power_sums(moments)]
        case stats.ComomentsState(x, y, c):
            products = Fraction(c) + x.count * Fraction(x.mean) * Fraction(y.mean)
            found = [x.count, *_power_sums(x), *_power_sums(y), products]
        case stats.HistogramState(counts, below, above):
            found = [*counts, below, above]
        case LevelsState(by_level):
            found = [by_level[level]]
        case SurvivalState():
            if list(edges) != sorted({*edges} & {*state.edges}):
                raise BadMessage("the layout of the sums has other time bins than this peer tells")
            coarse = coarsen(state, edges)
            found = [*coarse.events, *coarse.censored]
        case FitState():
            sums = (*state.score, *state.information, state.deviance, state.pearson, state.base)
            found = [state.rows, *sums]
        case RiskState():
            found = [*state.events, *state.censored, *state.covariates, *state.sums]
        case _:
            raise BadMessage(f"{type(state).__name__} has no sums")
    return [Fraction(number) for number in found]


def _power_sums(moments: Moments) -> tuple[Fraction, Fraction]:
    """The sum of the values and that of their squares, without rounding."""
    total = moments.count * Fraction(moments.mean)
    return total, Fraction(moments.m2) + total * Fraction(moments.mean)


def decode(
    query: Query, layout: Layout, totals: Words, peers: Collection[str]
) -> dict[Group, tuple[int, tuple[State, ...]]]:
    """By group, the rows and the states of these peers together, from the unmasked sums.

    Raises CohortLost for sums that honest peers cannot have sent.
    """
    items = _items(query, layout)
    told = np.any([told_by(layout, peer, len(items)) for peer in peers], axis=0)
    numbers = iter(_to_fractions(totals))
    rows: dict[Group, int] = {}
    states: dict[Group, dict[int, State]] = {group: {} for group in layout.groups}
    try:
        for item, is_told in zip(items, told, strict=True):
            some = iter([next(numbers) for _ in range(item.size)])
            found = states[item.group]
            if item.place < 0:
                rows[item.group] = _count(some)
            elif item.level:
                old = found.get(item.place, LevelsState())
                assert isinstance(old, LevelsState)
                counts = old.counts | ({item.level: count} if (count := _count(some)) else {})
                found[item.place] = LevelsState(counts)
            elif is_told:
                operation, edges = query.operations[item.place], layout.edges[item.place]
                found[item.place] = _decode(operation, edges, some, len(edges))
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


def _count(numbers: Iterator[Fraction]) -> int:
    """The next number, which is a count. Raises ValueError."""
    number = next(numbers, Fraction())
    if number < 0 or number.denominator != 1 or number > 1 << 53:
        raise ValueError(f"{float(number):g} is no count of rows")
    return int(number)


def _decode(
    operation: Operation, edges: tuple[float, ...], numbers: Iterator[Fraction], num_edges: int
) -> State:
    """The state with these sums; without any, that of no row."""

    def floats(count: int) -> tuple[float, ...]:
        return tuple(float(next(numbers, Fraction())) for _ in range(count))

    def counts(count: int) -> tuple[int, ...]:
        return tuple(_count(numbers) for _ in range(count))

    model = operation.model
    width, bins = (0, 1) if model is UNSET else (len(model.at), len(model.edges) + 1)
    match operation.kind:
        case "count" | "missing":
            return stats.CountState(_count(numbers))
        case "cov" | "corr":
            return _comoments(numbers)
        case "histogram":
            return stats.HistogramState(counts(int(operation.args[0])), *counts(2))
        case "survival":
            return SurvivalState(edges, counts(num_edges + 1), counts(num_edges + 1))
        case "glm":
            rows = _count(numbers)
            return FitState(rows, floats(width), floats(upper_size(width)), *floats(3))
        case "cox":
            sums = 2 * bins * (1 + width + upper_size(width))
            return RiskState(counts(bins), counts(bins), floats(width), floats(sums))
    return stats.MomentsState(_moments(_count(numbers), numbers)[0])


def _moments(count: int, numbers: Iterator[Fraction]) -> tuple[Moments, Fraction]:
    """The moments from the next two sums, and the mean without rounding."""
    total, squares = next(numbers, Fraction()), next(numbers, Fraction())
    if not count:
        return Moments(), Fraction()
    mean = total / count
    # Rounding of the peers' own means and sums can make it negative if all values are alike.
    m2 = max(Fraction(), squares - total * mean)
    return Moments(count, float(mean), float(m2)), mean


def _comoments(numbers: Iterator[Fraction]) -> stats.ComomentsState:
    count = _count(numbers)
    x, mean_x = _moments(count, numbers)
    y, mean_y = _moments(count, numbers)
    products = next(numbers, Fraction())
    return stats.ComomentsState(x, y, float(products - count * mean_x * mean_y))
