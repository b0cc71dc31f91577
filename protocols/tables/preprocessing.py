"""The preprocessing that all peers of a run share, derived from their merged statistics. Pure.

Value              becomes
number, date       (value - mean) / scale; a date is a number of days since 1970
boolean            0 or 1, then as a number
missing number     the mean, that is 0; and 1 in a second feature, if any peer has missing values
text               the index of its category: 0 missing, 1 unseen or rare, then the vocabulary
absent column      missing in every row
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.errors import BadMessage, CommonweightError, SchemaMismatch, UsageError
from protocols.messages.envelope import Text
from protocols.tables import class_weights, mismatches, statistics
from protocols.tables.mismatches import Mismatches
from protocols.tables.statistics import NUMERIC, ColumnKind, ColumnStatistics, TableStatistics

#: A target with at most this many different whole numbers is treated as classes.
MAX_CLASSES = 20
MAX_BYTES = 128 * 1024

#: Notes about columns of few peers. Each note is an event, and one peer may have thousands of them.
_MAX_RARE_NOTES = 20

Setting = str | int | float | bool
_Texts = Annotated[tuple[Text, ...], Meta(max_length=65_536)]
_Weight = Annotated[float, Meta(gt=0, le=class_weights.MAX_WEIGHT)]


class Feature(Struct, frozen=True, kw_only=True):
    """An input column. `missing`: it has a second feature, 1 where the value is missing."""

    name: Text
    kind: ColumnKind
    mean: float = 0.0
    scale: float = 1.0
    missing: bool = False
    categories: _Texts = ()


class Target(Struct, frozen=True, kw_only=True):
    """The column to predict: one of `classes`, or a scaled number.

    `weights`: how much a row of each class counts, 1 on average; empty if all count alike.
    `weight_sum`: at least the weights of all rows together, and less than twice; 0: unknown.
    """

    name: Text
    kind: ColumnKind
    classes: _Texts = ()
    mean: float = 0.0
    scale: float = 1.0
    weights: Annotated[tuple[_Weight, ...], Meta(max_length=65_536)] = ()
    weight_sum: Annotated[float, Meta(ge=0)] = 0.0


class Preprocessing(Struct, frozen=True, kw_only=True):
    """The features in order, and the target. `hashed`: categories are hashes of values."""

    version: Literal[1] = 1
    features: Annotated[tuple[Feature, ...], Meta(max_length=statistics.MAX_COLUMNS)]
    target: Target
    hashed: bool = False

    @property
    def numeric(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind in NUMERIC)

    @property
    def categorical(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind not in NUMERIC)


def encode(preprocessing: Preprocessing) -> str:
    """Canonical JSON. Raises CommonweightError if it is too long."""
    text = msgspec.json.encode(preprocessing, order="sorted")
    if len(text) > MAX_BYTES:
        raise CommonweightError(
            f"the preprocessing takes {len(text)} bytes of {MAX_BYTES}: too many categories",
            "select columns: --features a,b,c",
        )
    return text.decode()


def decode(text: str) -> Preprocessing:
    """The preprocessing in `text`. Raises BadMessage."""
    try:
        made = msgspec.json.decode(text.encode(), type=Preprocessing)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as err:
        raise BadMessage(f"not a valid preprocessing: {err}") from err
    if made.target.weights and len(made.target.weights) != len(made.target.classes):
        raise BadMessage("not a valid preprocessing: it has not one weight for each class")
    return made


def check(made: Preprocessing) -> None:
    """Raise UsageError for a preprocessing that a person wrote and that cannot work."""
    names = [made.target.name, *(feature.name for feature in made.features)]
    if not made.features:
        raise UsageError("the preprocessing has no features")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"the preprocessing names the column {twice[0]} twice")
    if commas := [name for name in names if "," in name]:
        raise UsageError(f"the column {commas[0]!r} has a comma in its name")
    if len(made.target.classes) == 1:
        raise UsageError("the target of the preprocessing has one class: two are the fewest")
    columns: tuple[Feature | Target, ...] = (made.target, *made.features)
    for one in columns:
        kinds = one.classes if isinstance(one, Target) else one.categories
        if not (math.isfinite(one.mean) and 0 < one.scale < math.inf):
            raise UsageError(f"column {one.name}: mean must be finite, and scale above 0")
        if one.kind not in NUMERIC and not kinds:
            raise UsageError(f"column {one.name}: a text needs its categories, or its classes")


def digest(text: str) -> str:
    """SHA-256 (hex) of an encoded preprocessing; empty for none."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


class TableSettings(NamedTuple):
    """The settings of a run about its tables."""

    target: str
    kind: str
    features: tuple[str, ...]
    categorical: frozenset[str]
    scaling: str
    hashed: bool
    balanced: bool = False
    split_by: str = ""


def parse_settings(settings: Mapping[str, Setting]) -> TableSettings:
    """The table settings of a run. Raises UsageError."""
    target = str(settings.get("target", ""))
    if not target:
        raise UsageError("the task tabular needs the column to predict", "add --target COLUMN")
    kind, scaling = str(settings.get("kind", "auto")), str(settings.get("scaling", "standard"))
    if kind not in ("auto", "classification", "regression"):
        raise UsageError(f"--kind must be auto, classification or regression, not {kind!r}")
    if scaling not in ("standard", "minmax"):
        raise UsageError(f"scaling must be standard or minmax, not {scaling!r}")
    features = _names(settings.get("features", ""))
    weights = str(settings.get("class_weights", "none"))
    if weights not in ("none", "balanced"):
        raise UsageError(f"class_weights must be none or balanced, not {weights!r}")
    if target in features:
        raise UsageError(f"{target} is the target, so it cannot be a feature")
    hashed = str(settings.get("hashed", False)).lower() == "true"
    categorical = frozenset(_names(settings.get("categorical", "")))
    balanced = weights == "balanced"
    split_by = str(settings.get("split_by", "")).strip()
    if split_by == target:
        raise UsageError(
            f"{target} is the target, so rows cannot be held out by it",
            "--set split_by=COLUMN, a column of dates or numbers",
        )
    return TableSettings(target, kind, features, categorical, scaling, hashed, balanced, split_by)


def _names(text: Setting) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in str(text).split(",") if name.strip()))


class Derived(NamedTuple):
    """The preprocessing, the peers with incompatible tables, and notes for people.

    A note is a pair of a peer (or "") and a text.
    """

    preprocessing: Preprocessing
    incompatible: dict[str, SchemaMismatch]
    notes: list[tuple[str, str]]


class NoTableFits(CommonweightError):
    """No two tables fit together; `incompatible` says why, by peer."""

    def __init__(self, incompatible: dict[str, SchemaMismatch]) -> None:
        first = next(iter(incompatible.values()))
        super().__init__(f"no peer has a compatible table: {first.message}")
        self.incompatible = incompatible


def derive(tables: Mapping[str, TableStatistics], settings: Mapping[str, Setting]) -> Derived:
    """The preprocessing for most peers' tables. Raises NoTableFits, CommonweightError."""
    chosen = parse_settings(settings)
    incompatible: Mismatches = defaultdict(list)
    notes: list[tuple[str, str]] = []
    names = _choose_features(tables, chosen, incompatible, notes)
    for name in (chosen.target, *names):
        mismatches.find_other_kinds(name, tables, incompatible)
    if not chosen.features:
        mismatches.find_tables_apart(chosen.target, names, tables, incompatible)
    compatible = {p: table for p, table in sorted(tables.items()) if p not in incompatible}
    errors = {peer: SchemaMismatch.of_all(found) for peer, found in incompatible.items()}
    if not compatible:
        raise NoTableFits(errors)
    for name in (chosen.target, *names):
        notes += mismatches.other_spellings(name, compatible)
    merged = statistics.merge(compatible.values())
    for peer, table in compatible.items():
        if absent := [name for name in names if name not in table.columns]:
            notes.append((peer, mismatches.absent_text(absent, names, table)))
    for name in sorted(set(names) - merged.columns.keys()):
        names.remove(name)
        notes.append(("", f"column {name} is left out: no peer with a compatible table has it"))
    features = [
        feature
        for name in names
        if (feature := _make_feature(name, merged.columns[name], chosen, notes)) is not None
    ]
    if not features:
        raise CommonweightError("no column is left that could be a feature")
    target = _make_target(chosen, merged.columns[chosen.target])
    counts = merged.columns[chosen.target].categories
    if chosen.balanced:
        if not target.classes:
            raise UsageError(
                f"class_weights=balanced needs classes, and the target {target.name} is a number",
                "--kind classification, or without class_weights",
            )
        weights, total = class_weights.balanced(target.classes, counts)
        target = replace(target, weights=weights, weight_sum=total)
    elif target.classes and (hint := class_weights.rare_class_hint(counts)):
        notes.append(("", f"{hint}: {class_weights.BALANCED} gives all classes one weight"))
    return Derived(
        Preprocessing(features=tuple(features), target=target, hashed=chosen.hashed),
        errors,
        notes,
    )


def _choose_features(
    tables: Mapping[str, TableStatistics],
    chosen: TableSettings,
    incompatible: Mismatches,
    notes: list[tuple[str, str]],
) -> list[str]:
    """The sorted names of the chosen features, by default those that half of the peers have."""
    counts = Counter(name for table in tables.values() for name in table.columns)
    for name in (chosen.target, *chosen.features):
        what = "target" if name == chosen.target else "feature"
        if not counts[name]:
            known = ", ".join(sorted(counts)[:20]) or "none"
            raise CommonweightError(f"no peer has a column {name!r}; columns: {known}")
        for peer, table in tables.items():
            if name not in table.columns:
                mismatches.add_absent(incompatible[peer], name, f"the {what}", table.columns)
    if chosen.features:
        return sorted(chosen.features)
    compatible = [table for peer, table in tables.items() if peer not in incompatible]
    total = len(compatible)
    counts = Counter(name for table in compatible for name in table.columns)
    del counts[chosen.target], counts[chosen.split_by]
    rare = sorted(name for name, count in counts.items() if 2 * count < total)
    notes += [
        ("", f"column {n} is left out: {counts[n]} of {total} peers have it")
        for n in rare[:_MAX_RARE_NOTES]
    ]
    if (more := len(rare) - _MAX_RARE_NOTES) > 0:
        notes.append(
            ("", f"{more} more columns are left out: less than half of the peers have them")
        )
    return sorted(counts.keys() - set(rare))


def _make_feature(
    name: str, column: ColumnStatistics, chosen: TableSettings, notes: list[tuple[str, str]]
) -> Feature | None:
    if column.kind == "empty":
        notes.append(("", f"column {name} is left out: it has no values at any peer"))
        return None
    if column.unique and name not in chosen.features:
        notes.append(
            ("", f"column {name} is left out: each row has another number, as in an identifier")
        )
        return None
    if column.kind in NUMERIC:
        mean, scale = _scaling(name, column, chosen)
        return Feature(
            name=name, kind=column.kind, mean=mean, scale=scale, missing=column.missing > 0
        )
    if column.many or (column.written and not column.categories):
        why = "too many different texts for categories"
        if column.written:
            why = statistics.describe_kind(column)
        notes.append(("", f"column {name} is left out: {why}"))
        return None
    if not column.categories:
        notes.append(("", f"column {name} is left out: no text in it is common enough to share"))
        return None
    return Feature(name=name, kind="text", categories=statistics.sort_categories(column.categories))


def _scaling(name: str, column: ColumnStatistics, chosen: TableSettings) -> tuple[float, float]:
    if chosen.scaling == "minmax":
        if column.extremes is None:
            raise CommonweightError(f"no peer shares the minimum and maximum of column {name}")
        low, high = column.extremes
        return low, (high - low) or 1.0
    return column.moments.mean, math.sqrt(column.moments.variance) or 1.0


def _make_target(chosen: TableSettings, column: ColumnStatistics) -> Target:
    name = chosen.target
    if column.kind == "empty":
        raise CommonweightError(f"the target {name} has no values at any peer")
    classes = statistics.sort_categories(column.categories)
    few = not column.many and 0 < len(classes) <= MAX_CLASSES
    few = few or column.kind in ("text", "boolean")
    if chosen.kind == "classification" or (chosen.kind == "auto" and few):
        if column.many or column.kind == "date" or (column.kind == "number" and not column.whole):
            values = "too many different values" if column.many else f"{column.kind}s"
            raise CommonweightError(
                f"the target {name} cannot be classes: it has {values}", "--kind regression"
            )
        if len(classes) < 2:
            only = f"one class, {classes[0]!r}" if classes else "no class that is common enough"
            raise CommonweightError(f"the target {name} has {only}: there is nothing to learn")
        return Target(name=name, kind=column.kind, classes=classes)
    if column.kind not in NUMERIC:
        raise CommonweightError(
            f"the target {name} has text and cannot be a number", "--kind classification"
        )
    scale = math.sqrt(column.moments.variance)
    if not scale:
        raise CommonweightError(
            f"the target {name} is {column.moments.mean:g} in every row: there is nothing to learn"
        )
    return Target(name=name, kind=column.kind, mean=column.moments.mean, scale=scale)
