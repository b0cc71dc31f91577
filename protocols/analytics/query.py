"""A query over the tables of all peers. Pure.

`count, mean(age), histogram(income, 20, 0, 1e5) by sex where age >= 18` has three operations, one
grouping column and one condition (`parser` reads the text).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.messages.envelope import Name, Text

OperationKind = Literal[
    "count", "missing", "sum", "mean", "var", "std", "min", "max", "cov", "corr",
    "quantile", "histogram", "distinct",
]  # fmt: skip
Comparison = Literal["==", "!=", "<", "<=", ">", ">=", "in"]
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]

#: Limits of a query.
MAX_OPERATIONS, MAX_GROUPING, MAX_CONDITIONS = 32, 3, 16


class Operation(Struct, frozen=True, order=True):
    """One statistic of some `columns`; `args` are numbers (quantile, bins, range)."""

    kind: OperationKind
    columns: Annotated[tuple[Name, ...], Meta(max_length=2)] = ()
    args: Annotated[tuple[Number, ...], Meta(max_length=3)] = ()

    def __str__(self) -> str:
        inside = ", ".join([*self.columns, *(f"{arg:g}" for arg in self.args)])
        return f"{self.kind}({inside})" if inside else self.kind


class Condition(Struct, frozen=True):
    """Selects the rows whose `column` compares with a value, or is one of some values."""

    column: Name
    comparison: Comparison
    values: Annotated[tuple[Number | Text, ...], Meta(min_length=1, max_length=64)]

    def __str__(self) -> str:
        values = [f"{v:g}" if isinstance(v, float) else repr(v) for v in self.values]
        right = f"({', '.join(values)})" if self.comparison == "in" else values[0]
        return f"{self.column} {self.comparison} {right}"


class Query(Struct, frozen=True, kw_only=True):
    """A query to every peer. `epsilon`: the privacy budget for each answer; 0 for no noise.

    `bounds`: by column, the range to which values are clamped; noise requires them.
    """

    operations: Annotated[tuple[Operation, ...], Meta(min_length=1, max_length=MAX_OPERATIONS)]
    by: Annotated[tuple[Name, ...], Meta(max_length=MAX_GROUPING)] = ()
    where: Annotated[tuple[Condition, ...], Meta(max_length=MAX_CONDITIONS)] = ()
    epsilon: Annotated[float, Meta(ge=0, le=100)] = 0.0
    bounds: Annotated[dict[Name, tuple[Number, Number]], Meta(max_length=2 * MAX_OPERATIONS)] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns in the query, each once, in a fixed order."""
        named = [name for operation in self.operations for name in operation.columns]
        named += [*self.by, *(condition.column for condition in self.where)]
        return tuple(dict.fromkeys(named))

    def __str__(self) -> str:
        text = ", ".join(map(str, self.operations))
        text += f" by {', '.join(self.by)}" if self.by else ""
        text += f" where {' and '.join(map(str, self.where))}" if self.where else ""
        return text + (f" with ε = {self.epsilon:g}" if self.epsilon else "")

    @property
    def digest(self) -> str:
        """SHA-256 of the query."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()
