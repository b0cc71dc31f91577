"""The rows of each peer behind the sums of a secure question. Pure.

All peers see this before they mask anything, so each can compare the sums with earlier ones: two
sums that differ in the rows of one peer alone would tell the sum over these rows
(`agent.analytics.peer_sets`). Sums of the same values are compared, and numbers of rows: of groups,
under conditions, and of one category.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from protocols.analytics import row_sets
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query
from protocols.analytics.row_sets import PRIME, TIME, FigureRows, read_part
from protocols.analytics.syntax import format_number
from protocols.errors import BadMessage, SecureRefused
from protocols.privacy.question_layout import Item, Layout, items_of, rows_of, told_by

#: Before the column of events, in counts by time.
_AND = "and "
#: By peer, the rows of its own that a sum is over, as sorted pairs.
SumRows = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


class About(NamedTuple):
    """What is summed: the values of a column, or `of` it the number of rows of a category."""

    column: str
    of: str = ""

    @property
    def is_count(self) -> bool:
        """True for numbers of rows with a value, which conditions and groups count too."""
        return self.of.startswith(("=", _AND))


#: Numbers of rows.
ROWS = About("")
#: Numbers of rows less those of all categories or bins that one figure tells. What is left are rows
#: without a value, and those of categories that few peers have: this number can be computed.
REST = About("", "rest")
Sums = dict[About, set[SumRows]]


def check_own(query: Query, layout: Layout, peer: str, answer: PeerAnswer) -> None:
    """Raise BadMessage unless the layout says of this peer what its answer does."""
    if layout.rows.get(peer) != rows_of(query, layout, answer):
        raise BadMessage(
            "the layout of the sums does not say which rows this peer's figures are over",
            "the coordinator may be older than this agent: update it",
        )


def told_rows(query: Query, layout: Layout, peers: Collection[str]) -> Sums:
    """The rows of these peers that each sum is over. Raises BadMessage, SecureRefused."""
    items, width = items_of(query, layout), 1 + len(query.operations)
    place_of = {group: place for place, group in enumerate(layout.groups)}
    told = {peer: told_by(layout, peer, len(items)) for peer in peers}
    for peer in peers:
        if len(layout.rows.get(peer, ())) != width * len(place_of):
            raise SecureRefused(
                "older version",
                f"the peer {peer} does not tell which of its rows a sum is over, as its agent is "
                "older",
                "its owner can update it",
            )
    found: Sums = {}
    tellers: dict[tuple[int, int], set[str]] = {}
    categories: dict[tuple[int, int], list[SumRows]] = {}
    for number, item in enumerate(items):
        figure = group, _ = place_of[item.group], item.place
        at = group * width + 1 + item.place
        rows = {peer: layout.rows[peer][at] for peer, bits in told.items() if bits[number]}
        tellers.setdefault(figure, set()).update(rows)
        for about, sums in _sums_of(query, layout, item, rows):
            if sums:
                found.setdefault(about, set()).add(sums)
                if item.level:
                    categories.setdefault(figure, []).append(sums)

    def rows_of_group(group: int, peers: Collection[str]) -> SumRows:
        return _pick({peer: layout.rows[peer][group * width] for peer in peers}, "")

    for (group, _), parts in categories.items():
        if rest := _less(rows_of_group(group, tellers[group, -1]), parts):
            found.setdefault(REST, set()).add(rest)
    # The number of rows of a figure, less that of its group, is of the peers that leave it out.
    for (group, _), those in tellers.items() if query.by else ():
        if sums := rows_of_group(group, those):
            found.setdefault(ROWS, set()).add(sums)
    return found


def _sums_of(
    query: Query, layout: Layout, item: Item, rows: Mapping[str, FigureRows]
) -> Iterator[tuple[About, SumRows]]:
    """What the numbers of an item are about, and over which rows."""
    operation = None if item.place < 0 else query.operations[item.place]
    if operation is None or operation.kind in ("count", "columns"):
        yield ROWS, _pick(rows, "")
        return
    column = operation.columns[0]
    if operation.kind == "missing":
        yield About(column, "missing"), _pick(rows, "")
    elif operation.kind == "levels":
        label = str(layout.levels[item.place].index(item.level))
        yield About(column, f"={item.level}"), _pick(rows, label)
    elif operation.kind == "histogram":
        bins = ", ".join(map(format_number, operation.args))
        yield About(column, f"={item.level} of {bins}"), _pick(rows, item.level)
    elif operation.kind == "survival":
        for number in range(item.size):
            yield About(column, _AND + operation.columns[1]), _pick(rows, str(number))
    else:
        for place, column in enumerate(operation.columns):
            yield About(column), _pick(rows, "")
            label = row_sets.ones(place)
            if all(label in one for one in rows.values()):
                yield About(column, "=1"), _pick(rows, label)
                for other in {*operation.columns} - {column}:
                    yield About(other), _pick(rows, label)
        for label in {name for one in rows.values() for name in one}:
            if (of := read_part(label)) is not None:
                for column in operation.columns:  # combinations are many: they have their own
                    yield About(column, f"of {of}" if "&" in of else ""), _pick(rows, label)
                if of == TIME:  # a Cox model counts these rows, as "survival" does
                    time, event = operation.columns[:2]
                    yield About(time, _AND + event), _pick(rows, label)


def _less(total: SumRows, parts: Sequence[SumRows]) -> SumRows:
    """The rows of `total` that none of the parts has. These have no row in common."""
    left: dict[str, list[dict[int, int]]] = {peer: [dict(rows)] for peer, rows in total}
    for part in parts:
        for peer, rows in part:
            left.setdefault(peer, []).append({n: PRIME - factor for n, factor in rows})
    return _pick({peer: {"": row_sets.add(rows)} for peer, rows in left.items()}, "")


def _pick(rows: Mapping[str, FigureRows], label: str) -> SumRows:
    found = ((peer, rows[peer].get(label)) for peer in sorted(rows))
    return tuple((peer, tuple(sorted(some.items()))) for peer, some in found if some)
