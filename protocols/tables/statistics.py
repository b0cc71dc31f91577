"""What peers tell of a table instead of its rows: statistics that merge. Pure numpy.

Statistics of two parts merge to those of the whole, in any order: so a peer merges its chunks, and
the coordinator its peers, to what one pass over all rows would give (float64 rounding). Moments by
Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
1979, equation 2.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.messages.envelope import Count, Text

#: What a column holds. A truth value or a date counts as a number; "empty" has only missing values.
ColumnKind = Literal["number", "boolean", "date", "text", "empty"]
NUMERIC: frozenset[ColumnKind] = frozenset({"number", "boolean", "date"})

#: More different texts than these are no categories but names, notes or keys.
MAX_CATEGORIES = 1000

Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]


class Moments(Struct, frozen=True, array_like=True):
    """Count, mean, and `m2`, the sum of squared differences from the mean (float64)."""

    count: Count = 0
    mean: Finite = 0.0
    m2: Annotated[float, Meta(ge=0, le=1e300)] = 0.0

    @property
    def variance(self) -> float:
        """Of the values as a whole population; 0 for none."""
        return self.m2 / self.count if self.count else 0.0


def compute_moments(values: npt.NDArray[np.float64]) -> Moments:
    """The moments of finite values, float64[n]."""
    if not len(values):
        return Moments()
    mean = float(values.mean())
    return Moments(len(values), mean, float(np.square(values - mean).sum()))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both together."""
    count = a.count + b.count
    if not a.count or not b.count:
        return a if a.count else b
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + delta * delta * (a.count * b.count / count))


class ColumnStatistics(Struct, frozen=True, kw_only=True):
    """One column: `missing` values, and of the others moments or counts.

    `whole`: all its numbers are integers. `extremes`: least and most, told only on wish.
    `categories`: how often each value is there; `others` counts the values that are not told one by
    one. `many`: there are too many different ones to be categories.
    """

    kind: ColumnKind
    missing: Count = 0
    whole: bool = False
    moments: Moments = Moments()
    extremes: tuple[Finite, Finite] | None = None
    categories: dict[Text, Count] = {}
    others: Count = 0
    many: bool = False


class TableStatistics(Struct, frozen=True, kw_only=True, tag="table"):
    """A peer's table: its number of rows, and each column that its owner lets others know of."""

    rows: Count
    columns: dict[Text, ColumnStatistics]


def merge(parts: Iterable[TableStatistics]) -> TableStatistics:
    """The statistics of all parts together; a column that a part lacks counts as missing there.

    Kinds must agree (see `merge_columns`). Raises ValueError.
    """
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {
        name: reduce(
            merge_columns,
            (
                part.columns.get(name, ColumnStatistics(kind="empty", missing=part.rows))
                for part in parts
            ),
        )
        for name in names
    }
    return TableStatistics(rows=sum(part.rows for part in parts), columns=columns)


def merge_kinds(a: ColumnKind, b: ColumnKind) -> ColumnKind:
    """The kind that holds both. Raises ValueError where there is none."""
    if a == b or b == "empty":
        return a
    if a == "empty":
        return b
    if {a, b} == {"number", "boolean"}:
        return "number"
    raise ValueError(f"{a} and {b} in one column")


def merge_columns(a: ColumnStatistics, b: ColumnStatistics) -> ColumnStatistics:
    """One column in two parts. Raises ValueError for kinds that do not go together."""
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
    )


def without_rare_values(
    table: TableStatistics, min_count: int, *, hashed: Iterable[str] = ()
) -> TableStatistics:
    """What of a peer's statistics leaves it: no value that fewer than `min_count` rows have.

    Columns in `hashed` tell `hash_category` in place of each value.
    """
    hashed = frozenset(hashed)

    def told(name: str, column: ColumnStatistics) -> ColumnStatistics:
        common = {value: n for value, n in column.categories.items() if n >= min_count}
        rare = sum(column.categories.values()) - sum(common.values())
        if name in hashed:
            common = {hash_category(name, value): n for value, n in common.items()}
        return replace(column, categories=common, others=column.others + rare)

    return replace(
        table, columns={name: told(name, column) for name, column in table.columns.items()}
    )


def hash_category(column: str, value: str) -> str:
    """64 bits of SHA-256 in place of a value. Whoever guesses the value can check the guess."""
    return "#" + hashlib.sha256(f"{column}\0{value}".encode()).hexdigest()[:16]


def sort_categories(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Categories in the order that all peers share: numbers by size, then text by letters."""

    def place(value: str) -> tuple[bool, float, str]:
        try:
            number = float(value)
        except ValueError:
            return True, 0.0, value
        return not math.isfinite(number), number if math.isfinite(number) else 0.0, value

    return tuple(sorted(counts, key=place))
