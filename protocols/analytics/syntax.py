"""How names, numbers and texts are written in a query, and read again. Pure."""

from __future__ import annotations

import ast
import keyword
import re
from typing import Annotated

from msgspec import Meta

from protocols.errors import UsageError

Number = Annotated[float, Meta(ge=-1e300, le=1e300)]

#: The words that start the clauses of a text, in their order.
CLAUSES = ("by", "where", "bounds", "epsilon")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = frozenset({*CLAUSES, *map(str.lower, keyword.kwlist)})
#: Quoted text, or a sign of a formula: `~` after the outcome, `:` in an interaction. Python's own
#: `**`, which `:` becomes, has no operator and is refused.
_RELATION = re.compile(r"""("[^"]*"|'[^']*')|~|:|\*\*""")
_OPERATORS = {"~": "<<", ":": "**"}


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


def format_number(value: float) -> str:
    """A number with all its digits; without a decimal point if it is whole and not too large."""
    text = repr(float(value))
    return text.removesuffix(".0")


def parse_items(text: str, example: str) -> list[ast.expr]:
    """The items of a list with commas. Raises UsageError."""
    if not text.strip():
        return []
    tree = parse_expression(f"({text},)", example)
    return list(tree.elts) if isinstance(tree, ast.Tuple) else [tree]


def parse_expression(text: str, example: str) -> ast.expr:
    """One expression of Python, in which `a ~ b` is `a << b`, and `a:b` is `a ** b`.

    Raises UsageError.
    """
    try:
        words = _RELATION.sub(lambda found: found[1] or _OPERATORS[found[0]], text.strip())
        return ast.parse(words, mode="eval").body
    except (KeyError, SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise UsageError(f"not a valid query: {text.strip()[:200]}", f"such as: {example}") from err


def read_column(node: ast.expr) -> str:
    """The name of a column. Raises UsageError."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) <= 64:
        return node.value
    raise UsageError("expected the name of a column", """a word, or quoted: mean("home town")""")


def read_number(node: ast.expr) -> float:
    """A number. Raises UsageError."""
    value = read_value(node)
    if isinstance(value, str):
        raise UsageError(f"expected a number, not {value!r}")
    return value


def read_value(node: ast.expr) -> Number | str:
    """A number or a quoted text. Raises UsageError."""
    sign = 1.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1.0, node.operand
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            return sign * float(value)
        if isinstance(value, int | float) and abs(value) <= 1e300:
            return sign * float(value)
        if isinstance(value, str) and sign > 0 and len(value) <= 400:
            return value
    raise UsageError("expected a number or a quoted text", "age >= 18 and city == 'Oslo'")
