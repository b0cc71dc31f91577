"""Combines the peers' statistics into the figures that a query asks for. Pure.

A peer that refuses is left out by name, and so is one whose column has another kind of values than
the others'. The result says how many peers and what share of the rows it covers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct

from protocols.analytics import mergeable_states as stats
from protocols.analytics import sketches
from protocols.analytics.answer_size import max_answer_bytes
from protocols.analytics.mergeable_states import PeerAnswer, State
from protocols.analytics.model_states import (
    ColumnsState,
    FitState,
    LevelsState,
    RiskState,
    SurvivalState,
    upper_size,
)
from protocols.analytics.query import Operation, Query
from protocols.messages.decoding import MALFORMED
from protocols.tables.statistics import Moments

Figure = float | int | None | dict[str, Any]

#: The statistics that an operation needs; a histogram with given ends needs a HistogramState.
_STATES: dict[str, type[State]] = {
    **dict.fromkeys(("count", "missing", "estimates"), stats.CountState),
    **dict.fromkeys(("sum", "mean", "var", "std"), stats.MomentsState),
    **dict.fromkeys(("min", "max"), stats.RangeState),
    **dict.fromkeys(("cov", "corr"), stats.ComomentsState),
    **dict.fromkeys(("quantile", "histogram"), stats.QuantileState),
    "distinct": stats.DistinctState,
    "columns": ColumnsState,
    "levels": LevelsState,
    "survival": SurvivalState,
    "glm": FitState,
    "cox": RiskState,
}


GroupValues = tuple[str | None, ...]


class Group(Struct, frozen=True):
    """One group: its values, its number of rows, and a figure for each operation."""

    group: GroupValues
    rows: int
    figures: tuple[Figure, ...]


class AnalysisResult(Struct, frozen=True, kw_only=True):
    """The figures of all peers together, by group.

    `peers` of `asked` peers answered for `rows` rows. No peer tells how many rows it withholds.
    `withheld` figures of a peer's group are left out, because they describe too few rows.
    `similar` peers answered for the rows of an earlier question, which differ in a few rows or in
    none. `left_out` gives the reason by peer. `secure`: how exact secure sums are.
    """

    figures: tuple[str, ...]
    by: tuple[str, ...]
    groups: tuple[Group, ...]
    peers: int
    asked: int
    rows: int
    left_out: dict[str, str]
    withheld: int = 0
    similar: int = 0
    epsilon: float = 0.0
    secure: str = ""

    @property
    def label(self) -> str:
        """A line that says what the result covers."""
        return coverage(self, self.peers, self.asked, self.epsilon)


class Merged(NamedTuple):
    """The answers of all peers together: by group, its rows and a state for each operation.

    `used`: the answers by peer; without their numbers if `secure` says how exact the sums are.
    `left_out` gives the reason by peer.
    """

    cells: dict[GroupValues, tuple[int, tuple[State, ...]]]
    used: dict[str, PeerAnswer]
    left_out: dict[str, str]
    secure: str = ""

    @property
    def withheld(self) -> int:
        """The number of figures that peers have withheld."""
        told = (cell.states for answer in self.used.values() for cell in answer.cells)
        return sum(isinstance(state, stats.WithheldState) for states in told for state in states)

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.cells.values())

    @property
    def least_rows(self) -> int:
        """The rows of the peer with the fewest; of secure sums, the mean of all peers."""
        if self.secure:
            return self.rows // max(len(self.used), 1)
        return min((answer.rows for answer in self.used.values()), default=0)

    @property
    def similar(self) -> int:
        """The number of peers that answered for the rows of a similar question."""
        return sum(answer.similar for answer in self.used.values())


def coverage(of: AnalysisResult | Merged, peers: int, asked: int, epsilon: float = 0.0) -> str:
    """A line that says what figures of `peers` of `asked` peers cover."""
    parts = [f"{peers} of {asked} peers, {of.rows:,} rows"]
    if of.withheld:
        parts.append(f"{of.withheld} figures of too few rows left out")
    if of.similar:
        parts.append(f"{of.similar} peers answered for the rows of a similar question")
    if epsilon:
        parts.append(f"with noise for ε = {epsilon:g}")
    if of.secure:
        parts.append(of.secure)
    return "; ".join(parts)


def merge_answers(answers: Mapping[str, PeerAnswer], asked: Sequence[str]) -> Merged:
    """The answers by peer, merged. `asked` includes the silent peers."""
    left_out = {peer: "no answer in time" for peer in asked if peer not in answers}
    left_out |= {peer: answer.refused for peer, answer in answers.items() if answer.refused}
    accepted = {peer: answer for peer, answer in answers.items() if not answer.refused}
    left_out |= kind_conflicts(accepted)
    used = {peer: answer for peer, answer in accepted.items() if peer not in left_out}
    rows: Counter[GroupValues] = Counter()
    states: dict[GroupValues, list[tuple[State, ...]]] = defaultdict(list)
    for cell in (cell for answer in used.values() for cell in answer.cells):
        rows[cell.group] += cell.rows
        states[cell.group].append(cell.states)
    cells = {
        group: (rows[group], tuple(map(stats.merge, zip(*states[group], strict=True))))
        for group in sorted(states, key=lambda values: [(v is None, v or "") for v in values])
    }
    return Merged(cells, used, left_out)


def combine(
    query: Query, answers: Mapping[str, PeerAnswer], asked: Sequence[str]
) -> AnalysisResult:
    """The result of a query from the answers by peer. `asked` includes the silent peers."""
    return result_of(query, merge_answers(answers, asked), len(asked))


def result_of(query: Query, merged: Merged, asked: int) -> AnalysisResult:
    """The result of a query from the merged answers of `asked` peers."""
    return AnalysisResult(
        figures=tuple(map(str, query.operations)),
        by=query.by,
        groups=tuple(
            Group(group, rows, tuple(map(figure, query.operations, states)))
            for group, (rows, states) in merged.cells.items()
        ),
        peers=len(merged.used),
        asked=asked,
        rows=merged.rows,
        left_out=merged.left_out,
        withheld=merged.withheld,
        similar=merged.similar,
        epsilon=query.epsilon,
        secure=merged.secure,
    )


def validate(query: Query, answer: PeerAnswer) -> str:
    """The fault in the form of a peer's answer, as text; empty if there is none.

    A peer chooses every number in it: what passes here cannot break `combine`.
    """
    if answer.refused:
        return ""
    if sum(cell.rows for cell in answer.cells) > answer.rows and not query.epsilon:
        return "more rows in the cells than in the table"
    if len(answer.rows_of) not in (0, len(answer.cells)) or any(
        len(rows) != 1 + len(query.operations) for rows in answer.rows_of
    ):
        return "the rows of another number of figures than the query has"
    for cell in answer.cells:
        if len(cell.group) != len(query.by) or len(cell.states) != len(query.operations):
            return "another number of groups or figures than the query has"
        for operation, state in zip(query.operations, cell.states, strict=True):
            if not isinstance(state, (state_of(operation), stats.WithheldState)):
                return f"{operation} answered by another kind of statistics"
            match state:
                case stats.HistogramState(counts) if len(counts) != int(operation.args[0]):
                    return f"{operation} answered in other bins"
                case stats.DistinctState(least, most) if least > most:
                    return f"{operation} answered with no range"
                case SurvivalState(edges, events, censored) if len(
                    {*map(len, (events, censored)), len(edges) + 1}
                ) > 1 or list(edges) != sorted({*edges}):
                    return f"{operation} answered in other bins"
                case FitState() | RiskState() if not _fits(operation, state):
                    return f"{operation} answered with other numbers of sums"
    if len({cell.group for cell in answer.cells}) != len(answer.cells):
        return "a group occurs twice"
    return ""


def _fits(operation: Operation, state: FitState | RiskState) -> bool:
    """True if the state has a sum for each coefficient and bin of the model."""
    if operation.model is UNSET:
        return False
    width, bins = len(operation.model.at), len(operation.model.edges) + 1
    if isinstance(state, FitState):
        return (len(state.score), len(state.information)) == (width, upper_size(width))
    counts = len(state.events), len(state.censored), len(state.covariates), len(state.sums)
    return counts == (bins, bins, width, 2 * bins * (1 + width + upper_size(width)))


def max_bytes(query: str) -> int:
    """The most bytes that a peer's answer to this encoded query can have."""
    return max_answer_bytes(msgspec.json.decode(query, type=Query))


def validate_bytes(query: str, body: bytes) -> str:
    """The fault in the bytes of a peer's answer, as text; empty if there is none."""
    try:
        asked = msgspec.json.decode(query, type=Query)
        if len(body) > (most := max_answer_bytes(asked)):
            return f"it has {len(body):,} bytes, and this question needs at most {most:,}"
        return validate(asked, msgspec.json.decode(body, type=PeerAnswer))
    except MALFORMED as err:
        return f"not an answer ({err}); is the agent of another version?"


def state_of(operation: Operation) -> type[State]:
    """The statistics that an operation needs."""
    if operation.kind == "histogram" and len(operation.args) == 3:
        return stats.HistogramState
    return _STATES[operation.kind]


def figure(operation: Operation, state: State) -> Figure:
    """The figure of an operation; None where there is no value."""
    match state:
        case stats.CountState():
            return state.count
        case stats.MomentsState(moments):
            return _moment(operation.kind, moments)
        case stats.RangeState():
            return state.least if operation.kind == "min" else state.most
        case stats.ComomentsState(x, y, c):
            if operation.kind == "cov":
                return c / (x.count - 1) if x.count > 1 else None
            spread = math.sqrt(x.m2 * y.m2)
            return max(-1.0, min(1.0, c / spread)) if spread else None
        case stats.HistogramState(counts, below, above):
            least, most = operation.args[1:]
            bins = {"least": least, "most": most, "counts": list(counts)}
            return bins | {"below": below, "above": above}
        case stats.QuantileState() if operation.kind == "quantile":
            return sketches.quantile(state, operation.args[0])
        case stats.QuantileState():
            least, most, counts = sketches.quantile_histogram(state, int(operation.args[0]))
            return {"least": least, "most": most, "counts": list(counts), "about": True}
        case stats.DistinctState(fewest, most):
            return fewest if fewest == most else {"least": fewest, "most": most}
        case stats.WithheldState():
            return None
        case _:
            sums: dict[str, Any] = msgspec.to_builtins(state)
            return {name: value for name, value in sums.items() if name != "type"}


def _moment(kind: str, moments: Moments) -> Figure:
    """The sum or mean, or the variance or deviation of a sample (n - 1), as in pandas."""
    if kind == "sum":
        return moments.mean * moments.count
    if kind == "mean":
        return moments.mean if moments.count else None
    if moments.count < 2:
        return None
    variance = moments.m2 / (moments.count - 1)
    return variance if kind == "var" else math.sqrt(variance)


def kind_conflicts(answers: Mapping[str, PeerAnswer]) -> dict[str, str]:
    """The peers in which a column has another kind of values than in most, with the reason."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for answer in answers.values() for name in answer.kinds):
        kinds = {peer: answer.kinds.get(name, "empty") for peer, answer in answers.items()}
        common = Counter(kind for kind in kinds.values() if kind != "empty").most_common(1)
        for peer, kind in kinds.items():
            if common and kind not in ("empty", common[0][0]):
                found[peer] = (
                    f"column {name!r} holds {kind} there, and {common[0][0]} elsewhere; "
                    "its owner sees more: commonweight-agent data check"
                )
    return found
