"""Regression models in a query, and their text. Pure.

    glm(died ~ scaled(age, 60, 12) + C(sex, "f", "m"), family=binomial, at=(0, 0.1, -0.2))
    glm(died ~ age + sex + age:sex), or glm(died ~ age * sex)
    cox(months, died ~ age, bins=(6, 12), at=(0.1,))

People write a model without `at`. Peers get it with all levels, and with the coefficients `at`
which they compute the sums of one iteration.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from protocols.analytics.syntax import (
    Number,
    format_number,
    quote,
    quote_name,
    read_column,
    read_number,
    read_value,
)
from protocols.errors import UsageError
from protocols.messages.envelope import Count, Name, Text

Family = Literal["gaussian", "binomial", "poisson", "gamma"]
Link = Literal["identity", "logit", "log", "inverse"]

#: The links of each family; the first is the default.
LINKS: dict[Family, tuple[Link, ...]] = {
    "gaussian": ("identity", "log"),
    "binomial": ("logit",),
    "poisson": ("log",),
    "gamma": ("inverse", "log"),
}
#: Time bins end at multiples of a 64th of a power of 2.
MAX_BINS = 64
MAX_TERMS, MAX_PARAMETERS, MAX_EDGES, MAX_LEVELS = 32, 64, 64, 64


class Term(Struct, frozen=True, omit_defaults=True):
    """A column of numbers, minus `center` and divided by `scale`; or one of categories.

    `levels`: the categories; the first has no coefficient. Rows with other categories are left out.
    """

    column: Name
    categories: bool = False
    levels: Annotated[tuple[Text, ...], Meta(max_length=MAX_LEVELS)] = ()
    center: Number = 0.0
    scale: Number = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its coefficients."""
        if self.categories:
            return tuple(f"{self.column}[{level}]" for level in self.levels[1:])
        return (self.column,)

    def __str__(self) -> str:
        name = quote_name(self.column)
        if self.categories:
            return f"C({', '.join([name, *map(quote, self.levels)])})"
        if (self.center, self.scale) != (0.0, 1.0):
            return f"scaled({name}, {format_number(self.center)}, {format_number(self.scale)})"
        return name


class Model(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The terms of a model, and the coefficients `at` which its sums are computed.

    A generalized linear model has a family and a link, and an intercept as the first coefficient.
    A Cox model has the `edges` of time bins: bin i begins at edge i - 1; the first bin is open.
    `products`: interactions of two terms, by their places in `terms`, the lower one first.
    """

    terms: Annotated[tuple[Term, ...], Meta(min_length=1, max_length=MAX_TERMS)]
    family: Family | None = None
    link: Link | None = None
    at: Annotated[tuple[Number, ...], Meta(max_length=MAX_PARAMETERS)] = ()
    edges: Annotated[tuple[Number, ...], Meta(max_length=MAX_EDGES)] = ()
    products: Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=MAX_TERMS)] = ()

    def __post_init__(self) -> None:
        if any(not i < j < len(self.terms) for i, j in self.products):
            raise ValueError("an interaction is of two terms of the model")

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The places of the terms whose values are multiplied, for each part of the model."""
        return (*((place,) for place in range(len(self.terms))), *self.products)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the coefficients, in the order of `at`."""
        names = tuple(
            ":".join(parts)
            for block in self.blocks
            for parts in itertools.product(*(self.terms[place].names for place in block))
        )
        return ("intercept", *names) if self.family else names

    @property
    def sums_about_one(self) -> int:
        """The most sums about one column: one for each coefficient, and again for each interaction
        of the column."""
        return len(self.names) * max(Counter(itertools.chain(*self.blocks)).values())

    def text(self, kind: str, columns: tuple[str, ...]) -> str:
        """The model as `read_model` reads it. `columns`: those of the operation."""
        outcome = ", ".join(map(quote_name, columns[: len(columns) - len(self.terms)]))
        names = [quote_name(term.column) for term in self.terms]
        terms = [*map(str, self.terms), *(f"{names[i]}:{names[j]}" for i, j in self.products)]
        text = f"{outcome} ~ {' + '.join(terms)}"
        text += f", family={self.family}" if self.family else ""
        text += f", link={self.link}" if self.link else ""
        for name, numbers in (("bins", self.edges), ("at", self.at)):
            listed = ", ".join(map(format_number, numbers))
            text += f", {name}=({listed}{',' if len(numbers) == 1 else ''})" if numbers else ""
        return f"{kind}({text})"


def check_complete(model: Model) -> None:
    """Raise UsageError unless peers can be asked for the sums of an iteration of this model."""
    edges = [0.0, *model.edges, math.inf]
    step = 2.0 ** math.frexp(edges[-2])[1] / MAX_BINS
    if (
        len(model.at) != len(model.names)
        or any(term.categories and len(set(term.levels)) < 2 for term in model.terms)
        or any(len(set(term.levels)) < len(term.levels) for term in model.terms)
        or len(set(model.products)) < len(model.products)
        or any(not 1e-100 <= term.scale <= 1e100 for term in model.terms)
        or (model.family is not None and model.link not in LINKS[model.family])
        or any(low >= high for low, high in itertools.pairwise(edges))
        or any(edge % step for edge in model.edges)
    ):
        raise UsageError(
            "the question names no levels, coefficients, link or bins that fit the model",
            'ask by commonweight analyze "glm(…)"',
        )


def read_model(kind: str, call: ast.Call, example: str) -> tuple[tuple[str, ...], Model]:
    """The columns and the model in `glm(…)` or `cox(…)`. Raises UsageError."""
    wrong = UsageError(f"{kind} is written another way", f"write {example}")
    *before, last = call.args or [call.func]
    options = {option.arg: option.value for option in call.keywords}
    known = {"at", "family", "link"} if kind == "glm" else {"at", "bins"}
    if (
        not isinstance(last, ast.BinOp)
        or not isinstance(last.op, ast.LShift)
        or len(before) != (kind == "cox")
        or not options.keys() <= known
    ):
        raise wrong
    terms, products = _read_terms(_summands(last.right))
    outcome = (*map(read_column, before), read_column(last.left))
    columns = (*outcome, *(term.column for term in terms))
    if len(terms) > MAX_TERMS or len(set(columns)) < len(columns):
        raise UsageError(f"a model has at most {MAX_TERMS} terms, each column once", example)
    family = _word(options.get("family"), get_args(Family), "gaussian") if kind == "glm" else None
    link = _word(options.get("link"), get_args(Link), "") if kind == "glm" else ""
    model = Model(
        terms=terms,
        family=family,  # type: ignore[arg-type]
        link=link or None,  # type: ignore[arg-type]
        at=_numbers(options.get("at")),
        edges=_numbers(options.get("bins")),
        products=products,
    )
    if model.family and model.link and model.link not in LINKS[model.family]:
        raise UsageError(
            f"{family} has no link {link}", f"possible: {', '.join(LINKS[model.family])}"
        )
    return columns, model


def _summands(node: ast.expr) -> list[ast.expr]:
    found = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def _read_terms(nodes: list[ast.expr]) -> tuple[tuple[Term, ...], tuple[tuple[int, int], ...]]:
    """The terms, and their interactions: `a:b`, or `a * b` for `a + b + a:b`."""
    terms: list[Term] = []
    pairs: list[list[Term]] = []
    for node in nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Pow):
            pair = [_read_term(node.left), _read_term(node.right)]
            pairs.append(pair)
            if isinstance(node.op, ast.Mult):
                terms += [term for term in pair if term not in terms]
        else:
            terms.append(_read_term(node))
    products: dict[tuple[int, int], None] = {}
    by_column = {term.column: place for place, term in enumerate(terms)}
    for pair in pairs:
        places = sorted({by_column[term.column] for term in pair if term.column in by_column})
        if len(places) < 2 or any(
            term not in (terms[by_column[term.column]], Term(term.column)) for term in pair
        ):
            raise UsageError(
                "an interaction is of two different columns, which are terms of the model, too",
                "glm(outcome ~ age * sex), which is age + sex + age:sex",
            )
        products[places[0], places[1]] = None
    return tuple(terms), tuple(products)


def _read_term(node: ast.expr) -> Term:
    if not isinstance(node, ast.Call):
        return Term(read_column(node))
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name == "C" and node.args and not node.keywords:
        column, *levels = node.args
        words = [value for value in map(read_value, levels) if isinstance(value, str)]
        if len(words) == len(levels):
            return Term(read_column(column), True, tuple(words))
    if name == "scaled" and len(node.args) == 3 and not node.keywords:
        column, center, scale = node.args
        return Term(read_column(column), center=read_number(center), scale=read_number(scale))
    raise UsageError("a term is a column, or the categories of a column", "age + C(sex)")


def _word(node: ast.expr | None, known: tuple[str, ...], default: str) -> str:
    if node is None:
        return default
    word = read_column(node)
    if word not in known:
        raise UsageError(f"{word!r} is unknown", f"known: {', '.join(known)}")
    return word


def _numbers(node: ast.expr | None) -> tuple[float, ...]:
    if node is None:
        return ()
    if not isinstance(node, ast.Tuple):
        raise UsageError("expected numbers in parentheses", "at=(0, 0.5)")
    return tuple(map(read_number, node.elts))
