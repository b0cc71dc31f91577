"""The sums of a secure question (`analyze --secure`): the shapes of answers, and their layout.
Pure.

Peers first tell the shape of their answers: which groups, categories and time bins they have, and
which figures they do not tell; no number. The shapes agree on a layout: the sums that are computed,
and which peer is part of each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, Meta, Struct
from msgspec.structs import replace

from protocols.analytics import row_sets
from protocols.analytics.mergeable_states import (
    Cell,
    HistogramState,
    PeerAnswer,
    State,
    WithheldState,
)
from protocols.analytics.model_states import (
    MAX_TOLD_LEVELS,
    ColumnsState,
    LevelsState,
    SurvivalState,
    upper_size,
)
from protocols.analytics.models import MAX_EDGES
from protocols.analytics.query import Operation, Query
from protocols.analytics.row_sets import FigureRows
from protocols.errors import BadMessage, Refused, UsageError
from protocols.messages.envelope import Id, Text
from protocols.privacy.question_states import state_of
from protocols.privacy.secagg.messages import MAX_COHORT, Peers
from protocols.tables.statistics import Finite

Bits = npt.NDArray[np.bool_]
Group = tuple[str | None, ...]
#: By column ("": the rows alone), the sets of peers that sums about it are over.
ToldBy = dict[str, set[frozenset[str]]]

#: Numbers of an answer, at most.
MAX_NUMBERS = 16_384
#: Why these operations have no sums.
_NO_SUMS = {
    "quantile": "buckets of values of each peer; ask for histogram(c, bins, least, most)",
    "distinct": "numbers of different values, which do not add up",
    "min": "values of single rows",
    "max": "values of single rows",
    "estimates": "the estimate of each peer alone",
}


class Shape(Struct, frozen=True, kw_only=True):
    """The message of a peer before a secure question: its answer with 0 in place of all numbers.

    `together`: the sets of peers with which it has answered questions about the same columns.
    `minimum`: the fewest trusted peers of a sum, with this one.
    """

    answer: PeerAnswer
    together: Annotated[tuple[Peers, ...], Meta(max_length=16)] = ()
    minimum: Annotated[int, Meta(ge=0, le=1 << 32)] = 0


class Layout(Struct, frozen=True, kw_only=True):
    """The sums of a question, the same for all peers.

    `levels`, `edges`: by operation, the categories of `levels` and the time bins of `survival`.
    `told`: by peer, the bits of the items that it is part of, eight to a byte. `rows`: by peer, by
    group and figure, which rows of its own they are over (`question_rows`).
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
    rows: Annotated[
        dict[Id, Annotated[tuple[FigureRows, ...], Meta(max_length=MAX_NUMBERS)]],
        Meta(max_length=MAX_COHORT),
    ] = {}


class Item(NamedTuple):
    """Numbers that are in the sum or left out together: the rows of a group, a figure, or the rows
    of a category, such as a bin of a histogram.

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
            return state_of(operation, edges, iter(()), len(edges))
    return state_of(operation, (), iter(()), 0)


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
        common = sorted(set.intersection(*bins)) if bins else []
        figures = [
            [of[1 + place] for answer in shapes.values() for of in _rows_of_group(answer, group)]
            for group in groups
        ]
        edges.append(tuple(row_sets.join_bins(common, figures, minimum)))
    layout = Layout(groups=groups, levels=tuple(levels), edges=tuple(edges), told={})
    truth = {peer: truth_of(query, layout, answer) for peer, answer in shapes.items()}
    enough = np.stack([*truth.values()]).sum(axis=0) >= minimum
    told = {peer: np.packbits(bits & enough).tobytes() for peer, bits in truth.items()}
    rows = {peer: rows_of(query, layout, answer) for peer, answer in shapes.items()}
    return replace(layout, told=told, rows=rows)


def rows_of(query: Query, layout: Layout, answer: PeerAnswer) -> tuple[FigureRows, ...]:
    """The rows of each figure of the layout, by group; of those that the answer does not tell,
    none. Categories and time bins are numbered, as in the layout."""
    none: tuple[FigureRows, ...] = ({},) * (1 + len(query.operations))

    def of_group(group: Group) -> Iterator[FigureRows]:
        of_cell, *figures = next(_rows_of_group(answer, group), none)
        yield of_cell
        for place, (operation, rows) in enumerate(zip(query.operations, figures, strict=True)):
            match operation.kind:
                case "levels":
                    names = enumerate(layout.levels[place])
                    yield {str(n): rows[name] for n, name in names if name in rows}
                case "survival":
                    yield row_sets.by_bin(rows, layout.edges[place])
                case _:
                    yield rows

    return tuple(figure for group in layout.groups for figure in of_group(group))


def _rows_of_group(answer: PeerAnswer, group: Group) -> Iterator[tuple[FigureRows, ...]]:
    """The rows of the group's figures, if the answer has it."""
    return (
        rows
        for cell, rows in zip(answer.cells, answer.rows_of, strict=False)
        if cell.group == group
    )


def items_of(query: Query, layout: Layout) -> list[Item]:
    """The items in the order of their numbers. Raises BadMessage for a layout of another query."""
    if {len(layout.levels), len(layout.edges)} != {len(query.operations)} or any(
        len(group) != len(query.by) for group in layout.groups
    ):
        raise BadMessage("the layout of the sums is of another question")
    figures: list[tuple[int, str, int]] = [(-1, "", 1)]
    for place, operation in enumerate(query.operations):
        if operation.kind in ("levels", "histogram"):
            names = layout.levels[place] if operation.kind == "levels" else _bins(operation)
            figures += [(place, name, 1) for name in names]
        else:
            figures.append((place, "", _size(operation, len(layout.edges[place]))))
    # Before the list of all: a short layout can name millions.
    if (count := len(layout.groups) * sum(size for *_, size in figures)) > MAX_NUMBERS:
        raise Refused(
            f"the answer has {count:,} numbers, and a secure sum has at most {MAX_NUMBERS:,}",
            "ask about fewer groups, columns or terms",
        )
    return [Item(group, *figure) for group in layout.groups for figure in figures]


def _bins(operation: Operation) -> tuple[str, ...]:
    """The numbers of a histogram, by place: of its bins, and of the rows below and above."""
    return tuple(map(str, range(int(operation.args[0]) + 2)))


def _size(operation: Operation, edges: int) -> int:
    """The numbers of a figure."""
    width = 0 if operation.model is UNSET else len(operation.model.at)
    bins = 1 if operation.model is UNSET else len(operation.model.edges) + 1
    match operation.kind:
        case "count" | "missing" | "columns":
            return 1
        case "cov" | "corr":
            return 6
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
    rows = {cell.group: some for cell, some in zip(answer.cells, answer.rows_of, strict=False)}

    def has(item: Item) -> bool:
        if (cell := cells.get(item.group)) is None:
            return False
        if item.place < 0:
            return True
        state = cell.states[item.place]
        if isinstance(state, LevelsState):
            return item.level in state.counts
        if isinstance(state, HistogramState):  # in a shape, all bins are empty
            return item.group in rows and item.level in rows[item.group][1 + item.place]
        return not isinstance(state, WithheldState)

    return np.array([has(item) for item in items_of(query, layout)], bool)


def told_by(layout: Layout, peer: str, items: int) -> Bits:
    """Which items the sums have of a peer, bool[items]. Raises BadMessage."""
    packed = np.frombuffer(layout.told.get(peer, b""), np.uint8)
    if len(packed) != -(-items // 8):
        raise BadMessage(f"the layout of the sums does not say what {peer} is part of")
    return np.unpackbits(packed, count=items).astype(bool)


def fewest_together(query: Query, layout: Layout, me: str, among: Collection[str]) -> int:
    """Over the items that this peer is part of: the fewest peers `among` these that are, too."""
    count = len(items_of(query, layout))
    mine = told_by(layout, me, count)
    bits = [told_by(layout, peer, count) for peer in among if peer in layout.told]
    total = np.sum([np.zeros(count, bool), *bits], axis=0, dtype=np.int64).reshape(count)
    return int(total[mine].min(initial=MAX_COHORT))


def told_about(query: Query, layout: Layout, peers: Collection[str]) -> ToldBy:
    """The sets of these peers that the sums of each operation are over, in any group. An operation
    of which no peer tells is left out. Raises BadMessage, Refused."""
    items = items_of(query, layout)
    places = np.array([item.place for item in items])
    told = {peer: told_by(layout, peer, len(items)) for peer in peers}
    of_all = (*query.by, *(condition.column for condition in query.where))
    found: ToldBy = {}
    for place in range(-1, len(query.operations)):
        about = (() if place < 0 else query.operations[place].columns) + of_all
        those = frozenset(peer for peer, bits in told.items() if bits[places == place].any())
        for column in (about or ("",)) if those else ():
            found.setdefault(column, set()).add(those)
    return found


def terms(query: Query, layout: bytes) -> str:
    """The digest of what all peers of a sum answer alike: the question and the encoded layout."""
    sha = hashlib.sha256(msgspec.json.encode(query))
    return hashlib.sha256(sha.digest() + hashlib.sha256(layout).digest()).hexdigest()
