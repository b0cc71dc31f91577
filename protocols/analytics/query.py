"""A query over the tables of all peers, and its text. Pure.

`count, mean(age), histogram(income, 20, 0, 1e5) by sex where age >= 18` has three operations, one
grouping column and one condition. The text says all of a query: `parser.parse_text` reads it back,
and two different queries have different texts. So an owner who approves a text approves the query.
"""

from __future__ import annotations

import hashlib
import keyword
import re
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

#: The words that start the clauses of a text, in their order.
CLAUSES = ("by", "where", "bounds", "epsilon")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = frozenset({*CLAUSES, *map(str.lower, keyword.kwlist)})


class Operation(Struct, frozen=True, order=True):
    """One statistic of some `columns`; `args` are numbers (quantile, bins, range)."""

    kind: OperationKind
    columns: Annotated[tuple[Name, ...], Meta(max_length=2)] = ()
    args: Annotated[tuple[Number, ...], Meta(max_length=3)] = ()

    def __str__(self) -> str:
        inside = ", ".join([*map(quote_name, self.columns), *map(_number, self.args)])
        return f"{self.kind}({inside})" if inside else self.kind


class Condition(Struct, frozen=True):
    """Selects the rows whose `column` compares with a value, or is one of some values."""

    column: Name
    comparison: Comparison
    values: Annotated[tuple[Number | Text, ...], Meta(min_length=1, max_length=64)]

    def __str__(self) -> str:
        values = [_number(v) if isinstance(v, float) else quote(v) for v in self.values]
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
            f"{quote_name(name)} in ({_number(least)}, {_number(most)})"
            for name, (least, most) in self.bounds.items()
        ]
        text += f" bounds {' and '.join(ranges)}" if ranges else ""
        return text + (f" epsilon {_number(self.epsilon)}" if self.epsilon else "")

    @property
    def digest(self) -> str:
        """SHA-256 of the query."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def quote(text: str) -> str:
    """A text in double quotes, as Python reads it. Nothing in it can look like another text."""
    return '"' + "".join(map(_letter, text)) + '"'


def quote_name(name: str) -> str:
    """The name of a column: as it is if it is one ASCII word without a meaning, else quoted."""
    plain = _WORD.match(name) and name.lower() not in _RESERVED
    return name if plain else quote(name)


def _letter(letter: str) -> str:
    code = ord(letter)
    if letter.isprintable() and letter not in "\"'\\":
        return letter
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _number(value: float) -> str:
    """All digits of a number, without a decimal point if it is a whole one of usual size."""
    text = repr(float(value))
    return text.removesuffix(".0")
