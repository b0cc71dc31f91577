"""How all peers of a run turn rows into numbers, fixed from their merged statistics. Pure.

Value              becomes
number, date       (value - mean) / scale; a date counts as days since 1970
truth value        0 or 1, and then as a number
missing number     the mean, that is 0, and a 1 in a feature of its own where any peer misses one
text               the index of its category: 0 missing, 1 unseen or rare, then the vocabulary
absent column      missing in every row
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

from protocols.errors import BadMessage, CommonweightError, SchemaMismatch, UsageError
from protocols.messages.envelope import Text
from protocols.tables import statistics
from protocols.tables.statistics import NUMERIC, ColumnKind, ColumnStatistics, TableStatistics

#: A target of whole numbers with so many different ones at most is a class.
MAX_CLASSES = 20
MAX_BYTES = 128 * 1024

Setting = str | int | float | bool


class Feature(Struct, frozen=True, kw_only=True):
    """One column of the input. `missing`: it has a second feature, 1 where the value is missing."""

    name: Text
    kind: ColumnKind
    mean: float = 0.0
    scale: float = 1.0
    missing: bool = False
    categories: tuple[Text, ...] = ()


class Target(Struct, frozen=True, kw_only=True):
    """The column to be predicted: one of `classes`, or a number that is scaled."""

    name: Text
    kind: ColumnKind
    classes: tuple[Text, ...] = ()
    mean: float = 0.0
    scale: float = 1.0


class Preprocessing(Struct, frozen=True, kw_only=True):
    """Features in their order, and the target. `hashed`: categories are hashes of values."""

    version: Literal[1] = 1
    features: tuple[Feature, ...]
    target: Target
    hashed: bool = False

    @property
    def numeric(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind in NUMERIC)

    @property
    def categorical(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind not in NUMERIC)


def encode(preprocessing: Preprocessing) -> str:
    """As JSON, always the same. Raises CommonweightError if it is too long to travel."""
    text = msgspec.json.encode(preprocessing, order="sorted")
    if len(text) > MAX_BYTES:
        raise CommonweightError(
            f"the preprocessing takes {len(text)} bytes of {MAX_BYTES}: too many categories",
            "name the columns to be used: --features a,b,c",
        )
    return text.decode()


def decode(text: str) -> Preprocessing:
    """Raises BadMessage."""
    try:
        return msgspec.json.decode(text.encode(), type=Preprocessing)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as err:
        raise BadMessage(f"not a preprocessing: {err}") from err


def digest(text: str) -> str:
    """SHA-256 (hex) of an encoded preprocessing; empty for none."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


class TableSettings(NamedTuple):
    """The settings of a run that say what a table is used for."""

    target: str
    kind: str
    features: tuple[str, ...]
    categorical: frozenset[str]
    scaling: str
    hashed: bool


def parse_settings(settings: Mapping[str, Setting]) -> TableSettings:
    """Raises UsageError."""
    target = str(settings.get("target", ""))
    if not target:
        raise UsageError("which column is to be predicted?", "--target COLUMN")
    kind, scaling = str(settings.get("kind", "auto")), str(settings.get("scaling", "standard"))
    if kind not in ("auto", "classification", "regression"):
        raise UsageError(f"--kind is auto, classification or regression, not {kind!r}")
    if scaling not in ("standard", "minmax"):
        raise UsageError(f"scaling is standard or minmax, not {scaling!r}")
    features = _names(settings.get("features", ""))
    if target in features:
        raise UsageError(f"{target} is the target, and no feature of itself")
    hashed = str(settings.get("hashed", False)).lower() == "true"
    categorical = frozenset(_names(settings.get("categorical", "")))
    return TableSettings(target, kind, features, categorical, scaling, hashed)


def _names(text: Setting) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in str(text).split(",") if name.strip()))


class Derived(NamedTuple):
    """The preprocessing, the peers whose tables do not fit it, and what people should know.

    Notes are pairs of a peer (or nothing) and words.
    """

    preprocessing: Preprocessing
    incompatible: dict[str, SchemaMismatch]
    notes: list[tuple[str, str]]


def derive(tables: Mapping[str, TableStatistics], settings: Mapping[str, Setting]) -> Derived:
    """What fits most peers' tables. Raises CommonweightError where nothing does."""
    asked = parse_settings(settings)
    misfits: dict[str, SchemaMismatch] = {}
    notes: list[tuple[str, str]] = []
    names = _choose_features(tables, asked, misfits, notes)
    kinds = {}
    for name in (asked.target, *names):
        kinds[name] = _agree_on_kind(name, tables, misfits)
    fitting = {peer: table for peer, table in sorted(tables.items()) if peer not in misfits}
    if not fitting:
        first = next(iter(misfits.values()))
        raise CommonweightError(f"no peer's table fits: {first.message}")
    whole = statistics.merge(fitting.values())
    for peer, table in fitting.items():
        notes += [
            (peer, f"column {name} is absent and counts as missing")
            for name in names
            if name not in table.columns
        ]
    for name in sorted(set(names) - whole.columns.keys()):
        names.remove(name)
        notes.append(("", f"column {name} is left out: no peer whose table fits has it"))
    features = [
        feature
        for name in names
        if (feature := _make_feature(name, whole.columns[name], asked, notes)) is not None
    ]
    if not features:
        raise CommonweightError("no column is left that could be a feature")
    target = _make_target(asked, whole.columns[asked.target])
    made = Preprocessing(features=tuple(features), target=target, hashed=asked.hashed)
    return Derived(made, misfits, notes)


def _choose_features(
    tables: Mapping[str, TableStatistics],
    asked: TableSettings,
    misfits: dict[str, SchemaMismatch],
    notes: list[tuple[str, str]],
) -> list[str]:
    """The features' names, sorted: those asked for, else those that half of the peers have."""
    having = Counter(name for table in tables.values() for name in table.columns)
    for name in (asked.target, *asked.features):
        what = "target" if name == asked.target else "feature"
        if not having[name]:
            known = ", ".join(sorted(having)[:20]) or "none"
            raise CommonweightError(f"no peer has a column {name!r}; columns: {known}")
        for peer, table in tables.items():
            if name not in table.columns and peer not in misfits:
                misfits[peer] = SchemaMismatch(f"column {name}", f"the {what}", "no such column")
    if asked.features:
        return sorted(asked.features)
    fitting = [table for peer, table in tables.items() if peer not in misfits]
    having = Counter(name for table in fitting for name in table.columns)
    del having[asked.target]
    few = sorted(name for name, count in having.items() if 2 * count < len(fitting))
    notes += [("", f"column {n} is left out: {having[n]} of {len(fitting)} have it") for n in few]
    return sorted(having.keys() - set(few))


def _agree_on_kind(
    name: str, tables: Mapping[str, TableStatistics], misfits: dict[str, SchemaMismatch]
) -> ColumnKind:
    """The kind that most peers have; the others become misfits."""
    told = {p: t.columns[name].kind for p, t in tables.items() if name in t.columns}
    counts = Counter(kind for peer, kind in sorted(told.items()) if kind != "empty")
    if not counts:
        return "empty"
    if counts["number"]:
        counts["number"] += counts.pop("boolean", 0)
    agreed = counts.most_common(1)[0][0]
    for peer, kind in told.items():
        alike = kind in (agreed, "empty") or (kind, agreed) == ("boolean", "number")
        if not alike and peer not in misfits:
            misfits[peer] = SchemaMismatch(f"column {name}", agreed, kind)
    return agreed


def _make_feature(
    name: str, column: ColumnStatistics, asked: TableSettings, notes: list[tuple[str, str]]
) -> Feature | None:
    if column.kind == "empty":
        notes.append(("", f"column {name} is left out: it has no values at any peer"))
        return None
    if column.kind in NUMERIC:
        mean, scale = _scaling(name, column, asked)
        return Feature(
            name=name, kind=column.kind, mean=mean, scale=scale, missing=column.missing > 0
        )
    if column.many:
        notes.append(("", f"column {name} is left out: too many different texts for categories"))
        return None
    if not column.categories:
        notes.append(("", f"column {name} is left out: no text in it is common enough to be told"))
        return None
    return Feature(name=name, kind="text", categories=statistics.sort_categories(column.categories))


def _scaling(name: str, column: ColumnStatistics, asked: TableSettings) -> tuple[float, float]:
    if asked.scaling == "minmax":
        if column.extremes is None:
            raise CommonweightError(f"no peer tells least and most of column {name}")
        least, most = column.extremes
        return least, (most - least) or 1.0
    return column.moments.mean, math.sqrt(column.moments.variance) or 1.0


def _make_target(asked: TableSettings, column: ColumnStatistics) -> Target:
    name = asked.target
    if column.kind == "empty":
        raise CommonweightError(f"the target {name} has no values at any peer")
    classes = statistics.sort_categories(column.categories)
    few = not column.many and 0 < len(classes) <= MAX_CLASSES
    few = few or column.kind in ("text", "boolean")
    if asked.kind == "classification" or (asked.kind == "auto" and few):
        if column.many or column.kind == "date" or (column.kind == "number" and not column.whole):
            raise CommonweightError(
                f"the target {name} cannot be classes: it holds "
                + ("too many different values" if column.many else f"{column.kind}s"),
                "--kind regression",
            )
        if len(classes) < 2:
            only = f"one class, {classes[0]!r}" if classes else "no class that is common enough"
            raise CommonweightError(f"the target {name} has {only}: there is nothing to learn")
        return Target(name=name, kind=column.kind, classes=classes)
    if column.kind not in NUMERIC:
        raise CommonweightError(
            f"the target {name} holds text and cannot be a number", "--kind classification"
        )
    scale = math.sqrt(column.moments.variance)
    if not scale:
        raise CommonweightError(
            f"the target {name} is {column.moments.mean:g} in every row: there is nothing to learn"
        )
    return Target(name=name, kind=column.kind, mean=column.moments.mean, scale=scale)
