"""The list of claims in claims.toml, and the numbers in them.

claims.toml has a table for each page. A key is an excerpt of one statement of that page; each `{}`
in it stands for a number. Its value says what shows the claim:

    "excerpt" = "tests/path.py::test_name"                 one test, or a list of them
    "excerpt" = { run = "make bench", is = ["bench/bench-results.json: idle['agent_cpu_percent']"] }
    "excerpt" = { test = "…", is = ["agent.policy.rules: HOT_C"] }
    "excerpt" = { no_claim = "one of REASONS" }

`test` names tests, `run` the command of a benchmark. `is` has an expression for each `{}`: after a
results file in docs/, of its keys; after a module, of its names. The functions below help.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.docs.pages import PARTS, ROOT, WORDS

#: Why a statement with a number claims nothing that a test could show.
REASONS = {
    "for the reader": "says what the reader does, needs or has, in this example",
    "counts what follows": "counts items of the sentence or list beside it",
    "elsewhere": "a fact about the world or another program, not about commonweight",
    "method": "says how a benchmark measured; its figures stand beside it",
    "one experiment": "records one experiment, with its date or setting; no command repeats it",
}
_NAMES = sorted((*WORDS, *PARTS), key=len, reverse=True)
#: A number in a page: 1/34, 2,000, .948, 3.5, a sixth, twenty.
NUMBER = rf"(\d+/\d+|\d[\d,]*(?:\.\d+)?|\.\d+|(?:an? )?(?:\d+(?:rd|th)|{'|'.join(_NAMES)})\b)"


class Claim(NamedTuple):
    page: str
    excerpt: str
    tests: tuple[str, ...] = ()
    run: str = ""
    values: tuple[str, ...] = ()
    no_claim: str = ""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the excerpt, with a group for each number."""
        pieces = [re.escape(piece) for piece in self.excerpt.split("{}")]
        return re.compile(NUMBER.join(pieces).replace(r"\ ", r"\s+"), re.IGNORECASE)


def load(file: Path = Path(__file__).with_name("claims.toml")) -> list[Claim]:
    """Every claim of the list. Raises TypeError for an unknown key."""
    return list(_claims(tomllib.loads(file.read_text())))


def _claims(pages: dict[str, dict[str, Any]]) -> Iterator[Claim]:
    for page, entries in pages.items():
        for excerpt, given in entries.items():
            known = dict(given) if isinstance(given, dict) else {"test": given}
            yield Claim(
                page,
                excerpt,
                tests=_several(known.pop("test", ())),
                run=known.pop("run", ""),
                values=_several(known.pop("is", ())),
                **known,
            )


def _several(given: str | list[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


# --- numbers ---------------------------------------------------------------------------------


def fits(shown: str, value: float, *, rounded: bool) -> bool:
    """True if a page may show the value as `shown`; `rounded`: to the digits that it shows."""
    if part := _part(shown):
        return round(1 / value) == part if rounded else abs(value - 1 / part) < 1e-9
    number = WORDS.get(shown.lower())
    plain = shown.replace(",", "")
    found = float(plain) if number is None else number
    if not rounded:
        return abs(found - value) <= 1e-9 * max(1.0, abs(found))
    return abs(found - value) <= _half_a_digit(plain if number is None else "2") * (1 + 1e-9)


def _part(shown: str) -> int:
    """34 for 1/34 and a 34th, 6 for a sixth; 0 for any other number."""
    if found := re.fullmatch(r"1/(\d+)|(?:an? )?(\d+)(?:rd|th)", shown):
        return int(found[1] or found[2])
    word = shown.lower().removeprefix("an ").removeprefix("a ")
    return round(1 / PARTS[word]) if word in PARTS else 0


def _half_a_digit(plain: str) -> float:
    """Half of the last digit that counts; in 100 or more, zeros at the end do not count."""
    whole, _, decimals = plain.partition(".")
    if decimals:
        return 0.5 * 10.0 ** -len(decimals)
    zeros = len(whole) - len(whole.rstrip("0"))
    return 0.5 * 10.0**zeros if len(whole) >= 3 else 0.5


def written(shown: str, value: float) -> str:
    """The value in the form of `shown`; raises ValueError if that is a word."""
    if _part(shown):
        if not shown.startswith("1/"):
            raise ValueError(f"{shown} is a word: write {1 / value:.1f} by hand")
        return f"1/{1 / value:.0f}"
    if shown.lower() in WORDS:
        raise ValueError(f"{shown} is a word: write {value:.1f} by hand")
    decimals = len(shown.partition(".")[2])
    text = f"{value:,.{decimals}f}" if value >= 1000 else f"{value:.{decimals}f}"
    return text.removeprefix("0") if shown.startswith(".") else text


# --- values ----------------------------------------------------------------------------------


def is_measured(expression: str) -> bool:
    """True if the value comes from a results file, not from the code."""
    return expression.partition(":")[0].endswith(".json")


def value(expression: str) -> float:
    """The value of `FILE.json: expression` or `package.module: expression`."""
    where, _, rest = expression.partition(": ")
    names = results(where) if where.endswith(".json") else vars(importlib.import_module(where))
    helpers = {"one": one, "every": every, "mean": statistics.mean, "mean_of": mean_of}
    return float(eval(rest, {**names, **helpers}))


@cache
def results(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / file).read_bytes())
    return found


def one(rows: list[dict[str, Any]], key: str, **fields: Any) -> Any:
    """The key of the only row with these fields. Raises ValueError if there is not one."""
    (found,) = every(rows, key, **fields)
    return found


def every(rows: list[dict[str, Any]], key: str, **fields: Any) -> list[Any]:
    """The key of every row with these fields."""
    return [row[key] for row in rows if all(row.get(name) == is_ for name, is_ in fields.items())]


def mean_of(rows: list[dict[str, Any]], key: str, **fields: Any) -> float:
    """The mean of the key over the rows with these fields."""
    return statistics.mean(every(rows, key, **fields))
