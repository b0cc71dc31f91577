"""A query over the tables of all peers, and its text. Pure.

`count, mean(age), histogram(income, 20, 0, 1e5) by sex where age >= 18` has three operations, one
grouping column and one condition. The text contains all of a query: `parser.parse_text` reads it
back, and two different queries have different texts. So an owner who approves a text approves the
query.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from protocols.analytics.models import MAX_TERMS, Model
from protocols.analytics.syntax import Number, format_number, quote, quote_name
from protocols.messages.envelope import Name, Text

OperationKind = Literal[
    "count", "missing", "sum", "mean", "var", "std", "min", "max", "cov", "corr",
    "quantile", "histogram", "distinct", "columns", "levels", "estimates", "survival", "glm", "cox",
]  # fmt: skip
Comparison = Literal["==", "!=", "<", "<=", ">", ">=", "in"]

#: Limits of a query.
MAX_OPERATIONS, MAX_GROUPING, MAX_CONDITIONS = 32, 3, 16


class Operation(Struct, frozen=True, order=True):
    """One statistic of some `columns`; `args` are numbers (quantile, bins, range).

    `model`: what `glm` and `cox` fit. Their columns are those of the outcome, then of the terms.
    """

    kind: OperationKind
    columns: Annotated[tuple[Name, ...], Meta(max_length=MAX_TERMS + 2)] = ()
    args: Annotated[tuple[Number, ...], Meta(max_length=3)] = ()
    model: Model | UnsetType = UNSET  # not in the bytes of other operations, as in older versions

    def __str__(self) -> str:
        if self.model is not UNSET:
            return self.model.text(self.kind, self.columns)
        inside = ", ".join([*map(quote_name, self.columns), *map(format_number, self.args)])
        return f"{self.kind}({inside})" if inside else self.kind


class Condition(Struct, frozen=True):
    """Selects the rows whose `column` compares with a value, or is one of some values."""

    column: Name
    comparison: Comparison
    values: Annotated[tuple[Number | Text, ...], Meta(min_length=1, max_length=64)]

    def __str__(self) -> str:
        values = [format_number(v) if isinstance(v, float) else quote(v) for v in self.values]
        right = ", ".join(values)
        if self.comparison == "in":
            right = f"({right},)" if len(values) == 1 else f"({right})"
        return f"{quote_name(self.column)} {self.comparison} {right}"


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
        text += f" by {', '.join(map(quote_name, self.by))}" if self.by else ""
        text += f" where {' and '.join(map(str, self.where))}" if self.where else ""
        ranges = [
            f"{quote_name(name)} in ({format_number(least)}, {format_number(most)})"
            for name, (least, most) in self.bounds.items()
        ]
        text += f" bounds {' and '.join(ranges)}" if ranges else ""
        return text + (f" epsilon {format_number(self.epsilon)}" if self.epsilon else "")

    @property
    def for_any_coefficients(self) -> Query:
        """The query without the coefficients of its models. An owner who allows it allows all
        steps."""
        operations = (
            op
            if op.model is UNSET
            else Operation(op.kind, op.columns, model=replace(op.model, at=()))
            for op in self.operations
        )
        return replace(self, operations=tuple(operations))

    @property
    def digest(self) -> str:
        """SHA-256 of the query."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()
