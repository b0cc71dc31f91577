"""Mergeable statistics of a table, which peers send instead of rows. Pure numpy.

The statistics of two parts merge to those of the whole, in any order. So a peer merges its chunks,
and the coordinator its peers, to the result of one pass over all rows (up to float64 rounding).
Moments: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances, 1979, equation 2.1.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.messages.envelope import Count, Text

#: The kind of a column. Booleans and dates count as numbers; "empty" has only missing values.
ColumnKind = Literal["number", "boolean", "date", "text", "empty"]
NUMERIC: frozenset[ColumnKind] = frozenset({"number", "boolean", "date"})

#: Texts that are numbers or dates in another format, with what a person should do.
LOOKS_LIKE = {
    "comma": "like 1.234,5 (write 1234.5)",
    "local date": "like 31.3.2024 (write 2024-03-31)",
}
#: Words of a yes and of a no.
_YES = frozenset({"yes", "y", "true", "t", "1", "ja", "j", "oui", "o", "si", "sí", "sì", "s"})
_NO = frozenset({"no", "n", "false", "f", "0", "nein", "nee", "non", "nej"})
#: A column with more different texts has no categories, but names, notes or keys.
MAX_CATEGORIES = 1000
#: Of a description, which has 256 KB at most.
MAX_COLUMNS = 16_384

Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]


class Moments(Struct, frozen=True, array_like=True):
    """Count, mean, and `m2`, the sum of squared differences from the mean (float64)."""

    count: Count = 0
    mean: Finite = 0.0
    m2: Annotated[float, Meta(ge=0, le=1e300)] = 0.0

    @property
    def variance(self) -> float:
        """The population variance; 0 without values."""
        return self.m2 / self.count if self.count else 0.0


def compute_moments(values: npt.NDArray[np.float64]) -> Moments:
    """The moments of finite values, float64[n]."""
    if not len(values):
        return Moments()
    mean = float(values.mean())
    return Moments(len(values), mean, float(np.square(values - mean).sum()))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both parts together."""
    count = a.count + b.count
    if not a.count or not b.count:
        return a if a.count else b
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + delta * delta * (a.count * b.count / count))


class ColumnStatistics(Struct, frozen=True, kw_only=True):
    """Statistics of a column: the number of `missing` values, and moments or counts of the others.

    `whole`: all numbers are integers. `extremes`: minimum and maximum, only if the run needs them.
    `categories`: the count of each value; `others`: the count of values that are not listed.
    `many`: there are too many different values for categories. `written`: what all values of a text
    look like, a key of `LOOKS_LIKE`. `unique`: each row has another number, and the name is that of
    an identifier.
    """

    kind: ColumnKind
    missing: Count = 0
    whole: bool = False
    moments: Moments = Moments()
    extremes: tuple[Finite, Finite] | None = None
    categories: Annotated[dict[Text, Count], Meta(max_length=MAX_CATEGORIES)] = {}
    others: Count = 0
    many: bool = False
    written: Annotated[str, Meta(max_length=32)] = ""
    unique: bool = False


class TableStatistics(Struct, frozen=True, kw_only=True, tag="table"):
    """A peer's table: its number of rows, and the columns that its owner shares."""

    rows: Count
    columns: Annotated[dict[Text, ColumnStatistics], Meta(max_length=MAX_COLUMNS)]


def merge(parts: Iterable[TableStatistics]) -> TableStatistics:
    """The statistics of all parts together; a column that a part lacks counts as missing there.

    Raises ValueError for kinds that cannot be merged (see `merge_kinds`).
    """
    parts = list(parts)

    def merge_parts(name: str) -> ColumnStatistics:
        absent = (ColumnStatistics(kind="empty", missing=part.rows) for part in parts)
        columns = (part.columns.get(name, none) for part, none in zip(parts, absent, strict=True))
        return reduce(merge_columns, columns)

    names = dict.fromkeys(name for part in parts for name in part.columns)
    return TableStatistics(
        rows=sum(part.rows for part in parts), columns={name: merge_parts(name) for name in names}
    )


def describe_kind(column: ColumnStatistics) -> str:
    """The kind of a column for a person, with what its text looks like."""
    looks = LOOKS_LIKE.get(column.written)
    return f"{column.kind} {looks}" if looks else column.kind


def merge_kinds(a: ColumnKind, b: ColumnKind) -> ColumnKind:
    """The kind of a column with values of both kinds. Raises ValueError if there is none."""
    if a == b or b == "empty":
        return a
    if a == "empty":
        return b
    if {a, b} == {"number", "boolean"}:
        return "number"
    raise ValueError(f"{a} and {b} in one column")


def merge_columns(a: ColumnStatistics, b: ColumnStatistics) -> ColumnStatistics:
    """The statistics of one column in two parts. Raises ValueError, see `merge_kinds`."""
    kind = merge_kinds(a.kind, b.kind)
    counts = dict(a.categories)
    for name, count in b.categories.items():
        counts[name] = counts.get(name, 0) + count
    many = a.many or b.many or len(counts) > MAX_CATEGORIES
    empty = [part.kind == "empty" for part in (a, b)]
    extremes = [part.extremes for part in (a, b) if part.extremes is not None]
    whole = [part.whole for part, none in zip((a, b), empty, strict=True) if not none]
    return ColumnStatistics(
        kind=kind,
        missing=a.missing + b.missing,
        whole=bool(whole) and all(whole),
        moments=merge_moments(a.moments, b.moments),
        extremes=(min(e[0] for e in extremes), max(e[1] for e in extremes)) if extremes else None,
        categories={} if many else counts,
        others=a.others + b.others + (sum(counts.values()) if many else 0),
        many=many,
        written=a.written if a.written == b.written else "",
        unique=a.unique or b.unique,
    )


def without_rare_values(
    table: TableStatistics, min_count: int, *, hashed: Iterable[str] = ()
) -> TableStatistics:
    """The statistics that may leave a peer: without values that fewer than `min_count` rows have.

    Nor do they tell the number of such rows: they count as rows with the most frequent value, or
    with the mean. Columns in `hashed` have the `hash_category` of each value.
    """
    hashed = frozenset(hashed)

    def without_rare(name: str, column: ColumnStatistics) -> ColumnStatistics:
        common = {value: n for value, n in column.categories.items() if n >= min_count}
        rare = sum(column.categories.values()) - sum(common.values())
        if name in hashed:
            common = {hash_category(name, value): n for value, n in common.items()}
        column = replace(column, categories=common, others=column.others + rare)
        found = _without_few(column, min_count)
        if found.missing and not (found.moments.count or found.categories or found.others):
            # Its kind would tell that somebody has a value.
            return ColumnStatistics(kind="empty", missing=found.missing)
        return found

    columns = {name: without_rare(name, column) for name, column in table.columns.items()}
    return replace(table, columns=columns)


def _without_few(column: ColumnStatistics, min_count: int) -> ColumnStatistics:
    """The statistics without the number of missing or unlisted values, if it is small."""
    counts, moments = dict(column.categories), column.moments
    missing, others = column.missing, column.others
    if column.kind in NUMERIC:
        if 0 < moments.count < min_count:
            return ColumnStatistics(kind=column.kind, missing=missing + moments.count)
        if 0 < missing < min_count:
            moments, missing = replace(moments, count=moments.count + missing), 0
        others = moments.count - sum(counts.values()) if counts else others
    elif 0 < missing < min_count and (counts or others):
        missing, others = 0, others + missing
    if 0 < others < min_count and counts:
        counts[max(counts, key=lambda name: (counts[name], name))] += others
        others = 0
    elif 0 < others < min_count and missing:
        missing, others = missing + others, 0
    return replace(column, missing=missing, others=others, categories=counts, moments=moments)


def hash_category(column: str, value: str) -> str:
    """64 bits of SHA-256 in place of a value. This does not protect values that can be guessed."""
    return "#" + hashlib.sha256(f"{column}\0{value}".encode()).hexdigest()[:16]


def spelling_key(value: str) -> str:
    """The same for values that differ in case, spaces, hyphens and underscores alone."""
    return re.sub(r"[\s_-]+", "", value).casefold()


def alike_keys(values: Iterable[str]) -> dict[str, str]:
    """A key for each value, the same for those that may mean the same: that differ in case, spaces,
    hyphens and underscores alone, or if all of them mean yes or no, such as yes and 1."""
    words = {value: value.strip().casefold() for value in values}
    if all(word in _YES or word in _NO for word in words.values()):
        return {value: "yes" if word in _YES else "no" for value, word in words.items()}
    return {value: spelling_key(value) for value in words}


def sort_categories(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Categories in the same order on all peers: numbers by size, then text alphabetically."""

    def place(value: str) -> tuple[bool, float, str]:
        try:
            number = float(value)
        except ValueError:
            return True, 0.0, value
        return not math.isfinite(number), number if math.isfinite(number) else 0.0, value

    return tuple(sorted(counts, key=place))
