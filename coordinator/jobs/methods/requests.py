"""Reads a method as people write it: `ttest(age by sex)`, `glm(died ~ age + C(sex))`. Pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import NamedTuple

from protocols.analytics.models import Model, read_model
from protocols.analytics.parser import parse_conditions
from protocols.analytics.query import MAX_OPERATIONS, Condition, Operation, Query
from protocols.analytics.syntax import parse_expression, read_column, read_value
from protocols.errors import UsageError


class _Form(NamedTuple):
    """What a method takes: numbers of columns, whether by a column, further options."""

    example: str
    least: int
    most: int
    by: str = ""  # "needed", "possible" or not
    options: frozenset[str] = frozenset()

    @property
    def is_model(self) -> bool:
        return self.most == 0


_MANY = MAX_OPERATIONS
FORMS = {
    "ttest": _Form("ttest(age by sex)", 1, 1, "needed"),
    "anova": _Form("anova(age by city)", 1, 1, "needed"),
    "chi2": _Form("chi2(sex, smoker)", 2, 2),
    "corr": _Form("corr(age, bmi, income)", 3, 8),
    "pca": _Form("pca(age, bmi, income)", 2, 8),
    "hist": _Form("hist(age) or hist(age, bins=30)", 1, 1, options=frozenset({"bins"})),
    "table1": _Form("table1(by=treatment) or table1(age, sex, by=treatment)", 0, _MANY, "needed"),
    "glm": _Form("glm(outcome ~ age + C(sex), family=binomial)", 0, 0),
    "km": _Form("km(time, event) or km(time, event by treatment)", 2, 2, "possible"),
    "cox": _Form("cox(time, event ~ age + treatment)", 0, 0),
    "meta": _Form(
        "meta(age), meta(age by sex) or meta(died by sex, measure=odds)",
        1, 1, "possible", frozenset({"measure"}),
    ),
}  # fmt: skip

_START = re.compile(rf"\s*({'|'.join(FORMS)})\s*\(")
#: Quoted text, or the word before the column of the groups.
_BY = re.compile(r"""("[^"]*"|'[^']*')|\sby\s+(?!=)""", re.IGNORECASE)
_QUOTED_OR_PARENTHESIS = re.compile(r"""\"[^\"]*\"|'[^']*'|[()]""")


class Method(NamedTuple):
    """A method: its name, the columns, the column of the groups, the model, options, conditions.

    `peer_names`: by peer, for results that show single peers.
    """

    name: str
    text: str
    columns: tuple[str, ...]
    by: str
    model: Model | None
    options: dict[str, float | str]
    where: tuple[Condition, ...]
    peer_names: Mapping[str, str] = {}

    def query(self, *operations: Operation, by: tuple[str, ...] = ()) -> Query:
        """A question about the rows of the method."""
        return Query(operations=operations, by=by, where=self.where)


def parse_method(text: str, where: str = "") -> Method | None:
    """The method in `text`; None if it is a query of statistics. Raises UsageError."""
    if (start := _START.match(text)) is None:
        return None
    name, form = start[1], FORMS[start[1]]
    stop = _closing(text, start.end())
    inside, rest = text[start.end() : stop - 1], text[stop:].strip()
    if rest and not rest.lower().startswith("where "):
        if name == "corr":
            return None
        raise UsageError(f"{name} is asked alone", f"write {form.example}")
    if rest and where:
        raise UsageError("there are conditions in the query and in --where", "give one of them")
    call = parse_expression(f"f({_BY.sub(lambda f: f[1] or ' << ', inside)})", form.example)
    assert isinstance(call, ast.Call)
    if name == "corr" and len(call.args) == 2:
        return None
    conditions = parse_conditions(where or rest[len("where ") :])
    words = text[:stop].strip()
    if form.is_model:
        columns, model = read_model(name, call, form.example)
        if model.at or model.edges:
            raise UsageError(f"{name} finds the coefficients itself", f"write {form.example}")
        return Method(name, words, columns, "", model, {}, conditions)
    wrong = UsageError(f"{name} is written another way", f"write {form.example}")
    columns, by, options = _arguments(call)
    if (
        not form.least <= len(columns) <= form.most
        or (form.by == "needed" and not by)
        or (not form.by and by)
        or not options.keys() <= form.options
        or len({*columns, by}) != len(columns) + 1
    ):
        raise wrong
    return Method(name, words, columns, by, None, options, conditions)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one before `start`."""
    depth = 1
    for found in _QUOTED_OR_PARENTHESIS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise UsageError("a parenthesis is not closed", text[:80])


def _arguments(call: ast.Call) -> tuple[tuple[str, ...], str, dict[str, float | str]]:
    """The columns, the column of the groups, and the options."""
    columns, by = [], ""
    for node in call.args:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift) and not by:
            columns.append(read_column(node.left))
            by = read_column(node.right)
        else:
            columns.append(read_column(node))
    options: dict[str, float | str] = {}
    for option in call.keywords:
        if option.arg == "by" and not by:
            by = read_column(option.value)
        elif option.arg:
            word = isinstance(option.value, ast.Name)
            options[option.arg] = (read_column if word else read_value)(option.value)
    return tuple(columns), by, options
