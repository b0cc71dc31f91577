"""From peers' statistics to the figures that were asked for. Pure.

A peer whose columns hold something else than the others' is left out by name, as are those that
refuse; the answer says how many peers and which share of the rows it stands on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from protocols.analytics import sketches
from protocols.analytics.mergeable_states import (
    ComomentsState,
    CountState,
    DistinctState,
    HistogramState,
    MomentsState,
    PeerAnswer,
    QuantileState,
    RangeState,
    State,
    merge,
)
from protocols.analytics.query import Operation, Query
from protocols.tables.statistics import Moments

Figure = float | int | None | dict[str, Any]


class Group(Struct, frozen=True):
    """One group: its values, the rows that count in it, a figure for each operation."""

    group: tuple[str | None, ...]
    rows: int
    figures: tuple[Figure, ...]


class AnalysisResult(Struct, frozen=True, kw_only=True):
    """`peers` of `asked` have answered, with `rows` rows of the `all_rows` that they told of.

    `kept_back`: rows in cells that are too small to be told. `left_out`: why, by peer.
    """

    figures: tuple[str, ...]
    by: tuple[str, ...]
    groups: tuple[Group, ...]
    peers: int
    asked: int
    rows: int
    all_rows: int
    kept_back: int
    left_out: dict[str, str]
    epsilon: float = 0.0

    @property
    def label(self) -> str:
        """What the answer stands on, in words."""
        share = f", {self.rows / self.all_rows:.0%} of the rows" if self.all_rows else ""
        kept = f"; {self.kept_back:,} rows in cells too small to tell" if self.kept_back else ""
        noise = f"; with noise for ε = {self.epsilon:g}" if self.epsilon else ""
        return f"{self.peers} of {self.asked} peers{share}{kept}{noise}"


def combine(
    question: Query, told: Mapping[str, PeerAnswer], asked: Sequence[str]
) -> AnalysisResult:
    """The answer of all peers together. `told` is by peer; who is missing there said nothing."""
    left_out = {peer: "no answer in time" for peer in asked if peer not in told}
    left_out |= {peer: given.refused for peer, given in told.items() if given.refused}
    good = {peer: given for peer, given in told.items() if not given.refused}
    left_out |= _kind_conflicts(good)
    good = {peer: given for peer, given in good.items() if peer not in left_out}
    cells: dict[tuple[str | None, ...], list[tuple[int, tuple[State, ...]]]] = {}
    for given in good.values():
        for cell in given.cells:
            cells.setdefault(cell.group, []).append((cell.rows, cell.states))
    groups = []
    for group in sorted(cells, key=lambda values: [(v is None, v or "") for v in values]):
        parts = cells[group]
        states = [merge(column) for column in zip(*(s for _, s in parts), strict=True)]
        figures = map(figure, question.operations, states)
        groups.append(Group(group, sum(rows for rows, _ in parts), tuple(figures)))
    return AnalysisResult(
        figures=tuple(map(str, question.operations)),
        by=question.by,
        groups=tuple(groups),
        peers=len(good),
        asked=len(asked),
        rows=sum(group.rows for group in groups),
        all_rows=sum(given.rows for given in told.values()),
        kept_back=sum(given.kept_back for given in good.values()),
        left_out=left_out,
        epsilon=question.epsilon,
    )


def validate(question: Query, given: PeerAnswer) -> str:
    """What is wrong with the form of a peer's answer; empty if nothing is.

    A peer chose every number in it: here ends what it could break.
    """
    if given.refused:
        return ""
    in_cells = sum(cell.rows for cell in given.cells) + given.kept_back
    if in_cells > given.rows and not question.epsilon:
        return "more rows in the cells than in the table"
    for cell in given.cells:
        if len(cell.group) != len(question.by) or len(cell.states) != len(question.operations):
            return "another number of groups or figures than was asked for"
        for operation, state in zip(question.operations, cell.states, strict=True):
            if not isinstance(state, state_of(operation)):
                return f"{operation} answered by another kind of statistics"
            if isinstance(state, HistogramState) and len(state.counts) != int(operation.args[0]):
                return f"{operation} answered in other bins"
            if isinstance(state, DistinctState) and len(state.registers) not in (0, 1 << 14):
                return f"{operation} answered with other registers"
    if len({cell.group for cell in given.cells}) != len(given.cells):
        return "a group is there twice"
    return ""


def state_of(operation: Operation) -> type[State]:
    """The statistics that an operation needs."""
    match operation.kind:
        case "count" | "missing":
            return CountState
        case "sum" | "mean" | "var" | "std":
            return MomentsState
        case "min" | "max":
            return RangeState
        case "cov" | "corr":
            return ComomentsState
        case "quantile":
            return QuantileState
        case "histogram":
            return HistogramState if len(operation.args) == 3 else QuantileState
        case _:
            return DistinctState


def figure(operation: Operation, state: State) -> Figure:
    """What was asked for; None where there is no value to tell of."""
    match state:
        case CountState():
            return state.count
        case MomentsState(moments):
            return _moment(operation.kind, moments)
        case RangeState():
            return state.least if operation.kind == "min" else state.most
        case ComomentsState(x, y, c):
            if not x.count:
                return None
            if operation.kind == "cov":
                return c / (x.count - 1) if x.count > 1 else None
            spread = math.sqrt(x.m2 * y.m2)
            return max(-1.0, min(1.0, c / spread)) if spread else None
        case HistogramState():
            least, most = operation.args[1:]
            bins = {"least": least, "most": most, "counts": list(state.counts)}
            return bins | {"below": state.below, "above": state.above}
        case QuantileState() if operation.kind == "quantile":
            return sketches.quantile(state, operation.args[0])
        case QuantileState():
            least, most, counts = sketches.quantile_histogram(state, int(operation.args[0]))
            return {"least": least, "most": most, "counts": list(counts), "about": True}
        case DistinctState():
            return round(sketches.estimate_distinct(state))


def _moment(kind: str, moments: Moments) -> Figure:
    """Sum, mean, and variance and deviation of a sample (n - 1), as pandas has them."""
    if kind == "sum":
        return moments.mean * moments.count
    if not moments.count:
        return None
    if kind == "mean":
        return moments.mean
    if moments.count < 2:
        return None
    variance = moments.m2 / (moments.count - 1)
    return variance if kind == "var" else math.sqrt(variance)


def _kind_conflicts(told: Mapping[str, PeerAnswer]) -> dict[str, str]:
    """Peers in which a column holds something else than in most, with the words why."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for given in told.values() for name in given.kinds):
        kinds = {peer: given.kinds.get(name, "empty") for peer, given in told.items()}
        common = Counter(kind for kind in kinds.values() if kind != "empty").most_common(1)
        for peer, kind in kinds.items():
            if common and kind not in ("empty", common[0][0]):
                found[peer] = f"column {name!r} holds {kind} there, and {common[0][0]} elsewhere"
    return found


def validate_bytes(query: str, body: bytes) -> str:
    """What is wrong with an answer's bytes; empty if nothing is. For the coordinator's own gate."""
    try:
        question = msgspec.json.decode(query, type=Query)
        return validate(question, msgspec.json.decode(body, type=PeerAnswer))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        return f"not an answer: {err}"
