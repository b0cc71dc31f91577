"""Parses queries as people write them. Pure.

    count, mean(age), std(age), quantile(age, .5), histogram(income, 20) by sex

This uses Python's own parser, accepts only calls, names, numbers, strings and comparisons, and
evaluates nothing. Quote a column name that is not one word: "my town".
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from protocols.analytics.models import check_complete, read_model
from protocols.analytics.query import (
    MAX_CONDITIONS,
    MAX_GROUPING,
    MAX_OPERATIONS,
    Comparison,
    Condition,
    Operation,
    OperationKind,
    Query,
)
from protocols.analytics.syntax import (
    CLAUSES,
    parse_expression,
    parse_items,
    read_column,
    read_number,
    read_value,
)
from protocols.errors import UnknownName, UsageError

#: Quoted text, or a word that starts a clause.
_CLAUSE = re.compile(
    r"""\"[^\"]*\"|'[^']*'|\s(WORDS)(?=\s)""".replace("WORDS", "|".join(CLAUSES)), re.IGNORECASE
)


class _Signature(NamedTuple):
    """The arguments of an operation: columns, then `min_numbers` to `max_numbers` numbers."""

    columns: int
    min_numbers: int
    max_numbers: int
    example: str


SIGNATURES: dict[OperationKind, _Signature] = {
    "count": _Signature(0, 0, 0, "count"),
    "missing": _Signature(1, 0, 0, "missing(age)"),
    "sum": _Signature(1, 0, 0, "sum(age)"),
    "mean": _Signature(1, 0, 0, "mean(age)"),
    "var": _Signature(1, 0, 0, "var(age)"),
    "std": _Signature(1, 0, 0, "std(age)"),
    "min": _Signature(1, 0, 0, "min(age)"),
    "max": _Signature(1, 0, 0, "max(age)"),
    "cov": _Signature(2, 0, 0, "cov(age, income)"),
    "corr": _Signature(2, 0, 0, "corr(age, income)"),
    "quantile": _Signature(1, 1, 1, "quantile(age, 0.5)"),
    "histogram": _Signature(1, 1, 3, "histogram(income, 20) or histogram(income, 20, 0, 100000)"),
    "distinct": _Signature(1, 0, 0, "distinct(city)"),
    "columns": _Signature(0, 0, 0, "columns"),
    "levels": _Signature(1, 0, 0, "levels(city)"),
    "estimates": _Signature(0, 0, 0, "estimates"),
    "survival": _Signature(2, 1, 1, "survival(time, event, 128)"),
    "glm": _Signature(2, 0, 0, "glm(outcome ~ age + C(sex), family=binomial)"),
    "cox": _Signature(3, 0, 0, "cox(time, event ~ age + C(sex))"),
}
_IMPOSSIBLE = {
    "join": "rows of different peers are never combined",
    "sort": "rows never leave a peer, so they cannot be sorted over all peers",
    "top": "rows never leave a peer",
    "list": "rows never leave a peer",
    "select": "rows never leave a peer; ask for statistics such as mean(age)",
    "median": "write quantile(age, 0.5)",
    "nunique": "write distinct(city)",
    "avg": "write mean(age)",
}
_COMPARISONS: dict[type[ast.cmpop], Comparison] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.In: "in",
}  # fmt: skip


def parse_query(
    text: str,
    where: str = "",
    *,
    epsilon: float = 0.0,
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Query:
    """The query in `text`, with conditions in `where`. Raises UsageError, UnknownName.

    `text` may have all clauses itself, so that `parse_query(str(query)) == query`.
    """
    what, clauses = _split_clauses(text)
    if where and "where" in clauses:
        raise UsageError("there are conditions in the query and in --where", "give one of them")
    operations = tuple(_operation(node) for node in parse_items(what, "count, mean(age) by sex"))
    by = tuple(read_column(node) for node in parse_items(clauses.get("by", ""), "by sex, city"))
    if not operations:
        raise UsageError("the query is empty", "such as: count, mean(age) by sex")
    conditions = parse_conditions(where or clauses.get("where", ""))
    too_many = len(operations) > MAX_OPERATIONS or len(by) > MAX_GROUPING
    if too_many or len(conditions) > MAX_CONDITIONS:
        raise UsageError(
            f"a query has at most {MAX_OPERATIONS} operations, by at most {MAX_GROUPING} columns, "
            f"where at most {MAX_CONDITIONS} conditions hold"
        )
    query = Query(
        operations=operations,
        by=by,
        where=conditions,
        epsilon=epsilon or _epsilon(clauses.get("epsilon", "0")),
        bounds=bounds or _bounds(clauses.get("bounds", "")),
    )
    if missing := query.bounds.keys() - set(query.columns):
        raise UsageError(f"there are bounds for {min(missing)!r}, which is not in the query")
    if query.bounds and not query.epsilon:
        raise UsageError(
            "bounds need noise: clipped figures without noise would show single values",
            "add --epsilon 0.1, or leave the bounds out",
        )
    try:
        return msgspec.json.decode(msgspec.json.encode(query), type=Query)
    except msgspec.ValidationError as err:
        raise UsageError(f"not a valid query: {err}") from err


def check_text(query: Query) -> None:
    """Raise UsageError unless the query is what its text says, to the last digit.

    A program may send any operations and conditions, also some that no text has.
    """
    for operation in query.operations:
        if operation.model is not UNSET:
            check_complete(operation.model)
    try:
        same = parse_query(str(query)).digest == query.digest
    except UsageError as err:
        raise UsageError(f"the question has no text that says all of it: {err.message}") from err
    if not same:
        raise UsageError("the question is another than its text says")


def _split_clauses(text: str) -> tuple[str, dict[str, str]]:
    """The operations, and the text of each clause by its first word."""
    parts, words, at = [], [], 0
    for found in _CLAUSE.finditer(text := f" {text.strip()} "):
        if word := found[1]:
            parts.append(text[at : found.start()])
            words.append(word.lower())
            at = found.end(1)
    if words != sorted(set(words), key=CLAUSES.index):
        raise UsageError(
            f"the query has the clauses {', '.join(words)}: each may be there once, in the order "
            f"{', '.join(CLAUSES)}",
            "write: mean(age) by sex, city where age >= 18",
        )
    first, *rest = [*parts, text[at:]]
    return first, dict(zip(words, rest, strict=True))


def _epsilon(text: str) -> float:
    return read_number(parse_expression(text, "epsilon 0.1"))


def _bounds(text: str) -> dict[str, tuple[float, float]]:
    """The ranges in `age in (0, 110) and income in (0, 1e5)`."""
    found: dict[str, tuple[float, float]] = {}
    for condition in parse_conditions(text):
        match condition:
            case Condition(name, "in", (float(least), float(most))) if (
                name not in found and least < most
            ):
                found[name] = (least, most)
            case _:
                raise UsageError("bounds are a range for each column", "bounds age in (0, 110)")
    return found


def parse_conditions(text: str) -> tuple[Condition, ...]:
    """Comparisons joined by `and`. Raises UsageError."""
    if not text.strip():
        return ()
    tree = parse_expression(text, "age >= 18 and city == 'Oslo'")
    nodes = tree.values if isinstance(tree, ast.BoolOp) else [tree]
    if isinstance(tree, ast.BoolOp) and not isinstance(tree.op, ast.And):
        raise UsageError(
            "conditions can only be joined by 'and'", "for 'or', write: city in ('Oslo', 'Bergen')"
        )
    return tuple(_condition(node) for node in nodes)


def _condition(node: ast.expr) -> Condition:
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise UsageError("a condition is one comparison", "age >= 18 and city == 'Oslo'")
    comparison = _COMPARISONS.get(type(node.ops[0]))
    if comparison is None:
        raise UsageError("unknown comparison", f"known: {', '.join(_COMPARISONS.values())}")
    right = node.comparators[0]
    nodes = right.elts if isinstance(right, ast.Tuple | ast.List) else [right]
    if (comparison == "in") != isinstance(right, ast.Tuple | ast.List) or not nodes:
        raise UsageError("'in' needs values in parentheses", "city in ('Oslo', 'Bergen')")
    return Condition(
        read_column(node.left), comparison, tuple(read_value(value) for value in nodes)
    )


def _operation(node: ast.expr) -> Operation:
    called = node.func if isinstance(node, ast.Call) else node
    name = called.id if isinstance(called, ast.Name) else ""
    kind = next((known for known in SIGNATURES if known == name), None)
    if kind is None:
        raise _unknown(name)
    form = SIGNATURES[kind]
    if isinstance(node, ast.Call) and (kind == "glm" or kind == "cox"):
        columns, model = read_model(kind, node, form.example)
        return Operation(kind, columns, model=model)
    arguments = node.args if isinstance(node, ast.Call) else []
    if isinstance(node, ast.Call) and node.keywords:
        raise UsageError(f"{kind} takes no named arguments", f"write {form.example}")
    numbers = len(arguments) - form.columns
    valid = form.min_numbers <= numbers <= form.max_numbers
    if not valid or (kind == "histogram" and numbers == 2):
        raise UsageError(f"{kind} has a wrong number of arguments", f"write {form.example}")
    columns = tuple(read_column(argument) for argument in arguments[: form.columns])
    operation = Operation(kind, columns, tuple(map(read_number, arguments[form.columns :])))
    _check(operation)
    return operation


def _check(operation: Operation) -> None:
    args = operation.args
    if operation.kind == "quantile" and not 0 <= args[0] <= 1:
        raise UsageError("a quantile must be between 0 and 1", "the median is quantile(age, 0.5)")
    if operation.kind == "histogram":
        if args[0] != int(args[0]) or not 1 <= args[0] <= 1000:
            raise UsageError("a histogram has 1 to 1000 bins", SIGNATURES["histogram"].example)
        if len(args) == 3 and not args[1] < args[2]:
            raise UsageError(
                "the range of a histogram must start below its end", SIGNATURES["histogram"].example
            )
    if operation.kind == "survival" and (args[0] <= 0 or math.frexp(args[0])[0] != 0.5):
        raise UsageError("the time of survival is a power of 2", SIGNATURES["survival"].example)


def _unknown(name: str) -> UnknownName:
    if name in _IMPOSSIBLE:
        return UnknownName(f"{name} is not possible: {_IMPOSSIBLE[name]}")
    near = difflib.get_close_matches(name, SIGNATURES, 1)
    known = f"did you mean {near[0]}?" if near else f"known: {', '.join(SIGNATURES)}"
    return UnknownName(
        f"there is no operation {name!r}" if name else "an operation is missing", known
    )
