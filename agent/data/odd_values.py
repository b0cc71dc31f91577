"""Finds odd values in a table, with the command or the change that corrects them.

All functions look at a sample: the texts of some rows, without spaces around them.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from protocols.tables import statistics

#: Values of a column, from the most frequent.
Counts = Mapping[str, int]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SIGNED = re.compile(rf"[€$£¥]?\s?({_NUMBER.pattern}|\d{{1,3}}(,\d{{3}})+(\.\d+)?)\s?[%€$£¥]?")
_WITH_UNIT = re.compile(rf"{_NUMBER.pattern}\s*(?P<unit>[A-Za-zµ°/²³^]+[A-Za-zµ°/²³^0-9]*)")
_DATE = re.compile(r"(\d{1,2})[./-](\d{1,2})[./-](\d{2,4})\b.*")
_TOTAL = frozenset(
    {
        *("total", "totals", "sum", "grand total", "average", "mean", "gesamt", "summe", "total:"),
        *("mittelwert", "totale", "somme", "totaal", "suma", "media", "moyenne"),
    }
)
#: Numbers that people write for a missing value.
_CODES = frozenset({-999, -99, -9, 99, 999, 9999, 99999})
#: The days of Excel for 1982 and 2064, and names of columns with dates.
_EXCEL = (30_000, 60_000)
_NAME_OF_DATE = re.compile(r"(?i)date|datum|day|tag|fecha|visit|birth|geb")
_MAX_SHOWN = 4
#: From this share of its values on, a column of text is one of numbers with a few other values.
_MOSTLY = 0.5
_FORMAT, _MAP = "commonweight-agent data format", "commonweight-agent data map"


def text_notes(name: str, counts: Counts) -> Iterator[str]:
    """About a column of text."""
    total = sum(counts.values())
    words = shlex.quote(name)
    if not total:
        return
    if all(_SIGNED.fullmatch(value) for value in counts):
        yield f"numbers with signs in them: {_FORMAT} {words} 1,234.5 reads 12% as 12"
        return
    units = {found["unit"] if (found := _WITH_UNIT.fullmatch(value)) else "" for value in counts}
    if len(units) == 1 and (unit := units.pop()):
        yield f"numbers with the unit {unit}: delete it here, and write it into the column's name"
        return
    if groups := _alike(counts):
        for values in groups:
            usual = max(values, key=lambda value: (counts[value], value))
            pairs = " ".join(shlex.quote(f"{value}={usual}") for value in values if value != usual)
            yield f"spelled in several ways: {', '.join(values)}: {_MAP} {words} {pairs}"
        return
    others = {value: count for value, count in counts.items() if not _NUMBER.fullmatch(value)}
    if total - sum(others.values()) >= _MOSTLY * total:
        shown = sorted(others, key=lambda value: (-others[value], value))[:_MAX_SHOWN]
        more = f" and {len(others) - len(shown)} more" if len(others) > len(shown) else ""
        pairs = " ".join(shlex.quote(f"{value}=") for value in shown)
        yield (
            f"numbers, except {', '.join(map(repr, shown))}{more}: correct them, or read them as "
            f"missing: {_MAP} {words} {pairs}"
        )


def _alike(counts: Counts) -> list[list[str]]:
    """Groups of values that may mean the same; none among many different values."""
    if len(counts) > statistics.MAX_CATEGORIES:
        return []
    groups: dict[str, list[str]] = {}
    for value, key in sorted(statistics.alike_keys(counts).items()):
        groups.setdefault(key, []).append(value)
    return [found for found in groups.values() if len(found) > 1]


def date_note(name: str, values: Sequence[str]) -> str:
    """How to read local dates."""
    found = [match for value in values if (match := _DATE.fullmatch(value))]
    if not found:
        return "write 2024-03-31"
    if any(len(match[3]) < 4 for match in found):
        return "years with two digits: write 2024-03-31"
    first, second = (max(int(match[place]) for match in found) for place in (1, 2))
    words = shlex.quote(name)
    if first > 12 and second > 12:
        return "some begin with the day and some with the month: write 2024-03-31"
    if first > 12:
        return f"{_FORMAT} {words} 31.12.2024"
    if second > 12:
        return f"{_FORMAT} {words} 12/31/2024"
    return f"the day or the month may come first: {_FORMAT} {words} 31.12.2024, or 12/31/2024"


def number_format_note(name: str, values: Sequence[str]) -> str:
    """How to read numbers with commas."""
    words = shlex.quote(name)
    last = [max(value.rfind(","), value.rfind(".")) for value in values]
    pairs = [(value, place) for value, place in zip(values, last, strict=True) if place >= 0]
    is_point = {
        value[place]
        for value, place in pairs
        if len(value) - place != 4 or len(set(value) & {",", "."}) == 2
    }
    if is_point == {","}:
        return f"{_FORMAT} {words} 1.234,5"
    if is_point == {"."}:
        return f"{_FORMAT} {words} 1,234.5"
    if is_point:
        return "some have a comma for decimals and some a point: write 1234.5"
    grouped = any(value.count(",") > 1 or "'" in value or " " in value for value in values)
    if grouped or not any("," in value for value in values):
        return f"{_FORMAT} {words} 1,234.5"
    return f"1,234 may be 1234 or 1.234: {_FORMAT} {words} 1,234.5, or 1.234,5"


def number_notes(name: str, values: npt.NDArray[np.float64]) -> Iterator[str]:
    """About a column of numbers float64[n] without missing ones."""
    known = np.unique(values)
    if (
        len(known) > 1
        and _NAME_OF_DATE.search(name)
        and _EXCEL[0] < known[0] < known[-1] < _EXCEL[1]
    ):
        yield "numbers like the dates of Excel, where 45000 is 2023-03-15: format them as dates"
    for place, code in ((0, known[0]), (-1, known[-1])) if len(known) > 3 else ():
        rest = known[1:] if place == 0 else known[:-1]
        far = abs(code - rest[place]) > max(rest[-1] - rest[0], 1.0)
        count = int((values == code).sum())
        if far and count > 1 and code in _CODES:
            yield (
                f"{code:g} is there {count} times: if it stands for a missing value, {_MAP} "
                f"{shlex.quote(name)} {code:g}="
            )


def header_notes(names: Sequence[str]) -> Iterator[str]:
    """About the names of the columns."""
    for name in names:
        if name != name.strip():
            yield f"the name {name!r} has spaces at its ends, so other peers do not have it"
    if "" in names:
        yield "a column without a name is left out"
    if 2 * sum(bool(_NUMBER.fullmatch(name.strip())) for name in names) >= max(len(names), 2):
        yield f"the names are numbers ({', '.join(names[:3])}): does the file have a header?"


def row_notes(rows: Sequence[Sequence[str | None]]) -> Iterator[str]:
    """About whole rows, of which `rows` has the last ones."""
    empty = sum(all(value is None for value in row) for row in rows)
    if empty:
        yield f"{empty} empty rows at the end: they are not used, but delete them"
    last = next((row for row in reversed(rows) if any(value is not None for value in row)), ())
    if any(value is not None and value.strip().casefold() in _TOTAL for value in last):
        yield "the last row looks like a total: delete it, as it counts as a row"


def sorted_counts(values: Sequence[str]) -> Counts:
    return dict(Counter(values).most_common())
