"""In which columns the tables of peers do not fit together, and which others may be meant. Pure."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice

from protocols.errors import SchemaMismatch
from protocols.tables import statistics
from protocols.tables.statistics import ColumnKind, ColumnStatistics, TableStatistics

#: By peer: everything in its table that does not fit.
Mismatches = defaultdict[str, list[SchemaMismatch]]

#: Names in a message.
_MAX_SHOWN = 6
#: Similar names are searched among this many columns, and among names up to this length. A peer
#: chooses its names, and comparing 400 columns with 400 others takes 10 s.
_MAX_COMPARED, _MAX_COMPARED_CHARS = 500, 64


def _near_names(name: str, there: Iterable[str]) -> list[str]:
    """Up to 3 columns with nearly this name, without regard to case.

    Not all are looked at, as that is slow: long names and those after the first 500 are left out.
    """
    if len(name) > _MAX_COMPARED_CHARS:
        return []
    short = (column for column in there if len(column) <= _MAX_COMPARED_CHARS)
    by_small = {column.lower(): column for column in islice(short, _MAX_COMPARED)}
    return [by_small[small] for small in get_close_matches(name.lower(), by_small, 3)]


def _first_near(names: Iterable[str], there: Sequence[str]) -> list[str]:
    """The columns nearest to the first of these names, without repetition."""
    near = (_near_names(name, there)[:1] for name in islice(names, _MAX_SHOWN))
    return list(dict.fromkeys(chain.from_iterable(near)))


def add_absent(
    found: list[SchemaMismatch],
    name: str,
    expected: str,
    there: Iterable[str],
    hint: str = "",
) -> None:
    """Add the error for a column that is not `there`. The first ones of a table name similar
    columns."""
    near = _near_names(name, there) if len(found) < _MAX_SHOWN else []
    text = f"a similar one: {' or '.join(map(_shown, near))}" if near else "no such column"
    found.append(SchemaMismatch(f"column {name}", expected, text, hint))


def _shown(name: str) -> str:
    """The name, in quotes if one would not see all of it."""
    return name if name == name.strip() else repr(name)


def no_common_feature(features: Iterable[str], there: Iterable[str]) -> SchemaMismatch:
    """The error for a table that has none of the features."""
    features, there = sorted(features), list(there)
    near = _first_near(features, there)
    shown = ", ".join(features[:_MAX_SHOWN]) + (", …" if len(features) > _MAX_SHOWN else "")
    found = f"none of them (similar: {', '.join(near)})" if near else "none of them"
    return SchemaMismatch("features", f"some of {shown}", found)


def find_tables_apart(
    target: str,
    names: list[str],
    tables: Mapping[str, TableStatistics],
    incompatible: Mismatches,
) -> None:
    """Find the peers whose table has no feature in common with that of another peer."""
    if len(tables) < 2:
        return
    counts = Counter(name for table in tables.values() for name in names if name in table.columns)
    common = {name for name in names if counts[name] > 1}
    for peer, table in tables.items():
        if common.isdisjoint(table.columns) and peer not in incompatible:
            others = common or {name for name in names if name not in table.columns}
            there = table.columns.keys() - {target}
            incompatible[peer].append(no_common_feature(others, sorted(there)))


def absent_text(absent: list[str], names: list[str], table: TableStatistics) -> str:
    """A note for a peer without some of the features."""
    many = len(absent) > 1
    what = f"columns {', '.join(absent[:_MAX_SHOWN])}" if many else f"column {absent[0]}"
    more = f" and {len(absent) - _MAX_SHOWN} more" if len(absent) > _MAX_SHOWN else ""
    small, known = {name.lower() for name in absent}, set(names)
    others = [name for name in table.columns if name not in known or name.lower() in small]
    near = _first_near(absent, others)
    text = (
        f"{what}{more} {'are' if many else 'is'} absent and count{'' if many else 's'} as missing"
    )
    if near:
        text += f"; the table has {', '.join(near)}"
    if 2 * len(absent) > len(names):
        text = f"has {len(names) - len(absent)} of {len(names)} features: {text}"
    return text


def find_other_kinds(
    name: str, tables: Mapping[str, TableStatistics], incompatible: Mismatches
) -> None:
    """Find the peers whose column has another kind than that of most peers."""
    common = common_kind(name, tables)
    for peer, table in tables.items():
        column = table.columns.get(name)
        if column is not None and not is_alike(column.kind, common):
            found = statistics.describe_kind(column)
            hint = _kind_hint(name, column, common, tables)
            incompatible[peer].append(SchemaMismatch(f"column {name}", common, found, hint))


def _kind_hint(
    name: str, column: ColumnStatistics, common: ColumnKind, tables: Mapping[str, TableStatistics]
) -> str:
    """The command that reads a column as one of the kind that most peers have; empty if unknown."""
    words = shlex.quote(name)
    match column.written:
        case "comma":
            return f"commonweight-agent data format {words} 1.234,5"
        case "local date":
            return f"commonweight-agent data format {words} 31.12.2024, or 12/31/2024"
    ours = ["false", "true"] if column.kind == "boolean" else sorted(column.categories)
    new = {"yes": "1", "no": "0"}
    if common == "text":
        others = Counter[str]()
        for table in tables.values():
            others.update(_categories(table, name))
        new = {key: value for value, key in statistics.alike_keys(reversed(_usual(others))).items()}
    keys = statistics.alike_keys(ours)
    if column.kind == "date" or not ours or any(keys[value] not in new for value in ours):
        return ""
    pairs = " ".join(shlex.quote(f"{value}={new[keys[value]]}") for value in ours)
    return f"commonweight-agent data map {words} {pairs}"


def _usual(counts: Mapping[str, int]) -> list[str]:
    """Values from the most frequent."""
    return sorted(counts, key=lambda value: (-counts[value], value))


def common_kind(name: str, tables: Mapping[str, TableStatistics]) -> ColumnKind:
    """The kind that a column has at most peers; "empty" without values.

    Text that looks like numbers or dates counts only if no peer has another kind.
    """
    columns = [table.columns[name] for _, table in sorted(tables.items()) if name in table.columns]
    known = [one for one in columns if one.kind != "empty"]
    counts = Counter(one.kind for one in known if not one.written)
    counts = counts or Counter(one.kind for one in known)
    if counts["number"]:
        counts["number"] += counts.pop("boolean", 0)
    return counts.most_common(1)[0][0] if known else "empty"


def is_alike(kind: ColumnKind, common: ColumnKind) -> bool:
    """True if a column of this kind can be used as one of the kind that most peers have."""
    return kind in (common, "empty") or (kind, common) == ("boolean", "number")


def other_spellings(name: str, tables: Mapping[str, TableStatistics]) -> Iterator[tuple[str, str]]:
    """A note for each peer that spells values differently from most rows, with the command that
    maps its spelling to theirs. Only values that peers have shared are compared."""
    total = Counter[str]()
    for table in tables.values():
        total.update(_categories(table, name))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for value, key in statistics.alike_keys(total).items():
        counts[key][value] = total[value]
    usual = {
        value: max(found, key=lambda value: (found[value], value))
        for found in counts.values()
        if len(found) > 1
        for value in found
    }
    for peer, table in tables.items():
        other = {v: usual[v] for v in _categories(table, name) if usual.get(v, v) != v}
        if other:
            shown = dict(islice(sorted(other.items()), _MAX_SHOWN))
            said = ", ".join(
                f"{ours!r} where others have {theirs!r}" for ours, theirs in shown.items()
            )
            pairs = [shlex.quote(f"{ours}={theirs}") for ours, theirs in shown.items()]
            command = " ".join(["commonweight-agent data map", shlex.quote(name), *pairs])
            yield peer, f"column {name} has {said}; to read them alike: {command}"


def _categories(table: TableStatistics, name: str) -> Mapping[str, int]:
    column = table.columns.get(name)
    return column.categories if column is not None and column.kind == "text" else {}
