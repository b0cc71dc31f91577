"""The classes of examples in folders: those that each peer sends, and the list of a run. Pure.

Like the categories of a table: a class leaves a peer only if enough examples have it there, and a
run has the classes of all peers together, sorted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from protocols.errors import BadMessage, CommonweightError, DataError
from protocols.messages.envelope import Count, Text
from protocols.tables.statistics import MAX_CATEGORIES, sort_categories

MAX_BYTES = 128 * 1024
_SHOWN = 5
_NAME_THEM = "name them yourself: --set classes=cat,dog"

ClassName = Annotated[Text, Meta(min_length=1)]


class ClassCounts(Struct, frozen=True, kw_only=True, tag="classes"):
    """The number of a peer's examples by class; `others` are of classes that it does not tell."""

    counts: Annotated[dict[ClassName, Count], Meta(max_length=MAX_CATEGORIES)]
    others: Count = 0


class AgreedClasses(Struct, frozen=True, kw_only=True):
    """The classes of a run, in the order of their numbers."""

    version: Literal[1] = 1
    classes: Annotated[tuple[ClassName, ...], Meta(min_length=2, max_length=MAX_CATEGORIES)]


class Agreement(NamedTuple):
    """The classes as text, and notes for people: pairs of a peer and what it lacks."""

    text: str
    notes: list[tuple[str, str]]


def share_counts(counts: Mapping[str, int], min_count: int) -> ClassCounts:
    """The counts that may leave a peer: no class with fewer than `min_count` examples. Raises
    DataError.

    If fewer than that are in such classes together, they count as examples of the largest class.
    """
    shared = {name: count for name, count in counts.items() if count >= max(1, min_count)}
    others = sum(counts.values()) - sum(shared.values())
    if shared and 0 < others < min_count:
        shared[max(shared, key=lambda name: (shared[name], name))] += others
        others = 0
    try:
        return msgspec.convert({"type": "classes", "counts": shared, "others": others}, ClassCounts)
    except msgspec.ValidationError as err:
        raise DataError(
            f"the names of the classes cannot be sent: at most {MAX_CATEGORIES} folders with "
            "printable names of at most 400 characters",
            f"the folders with examples: {', '.join(map(repr, counts))}",
        ) from err


def agree(peers: Mapping[str, ClassCounts]) -> Agreement:
    """The classes of all peers. Raises CommonweightError for fewer than two, or too many."""
    totals: dict[str, int] = {}
    for told in peers.values():
        for name, count in told.counts.items():
            totals[name] = totals.get(name, 0) + count
    names = sort_categories(totals)
    if len(names) < 2:
        found = f"only the class {names[0]!r}" if names else "no class"
        raise CommonweightError(
            f"the peers have {found} with enough examples to be told (data.min_count of each "
            f"owner), and two are needed; {_NAME_THEM}"
        )
    text = msgspec.json.encode(AgreedClasses(classes=names), order="sorted").decode()
    if len(names) > MAX_CATEGORIES or len(text) > MAX_BYTES:
        raise CommonweightError(f"the peers have {len(names)} classes together, which is too many")
    notes = []
    for peer, told in sorted(peers.items()):
        if lacking := [name for name in names if name not in told.counts]:
            more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
            has = len(names) - len(lacking)
            absent = f"{', '.join(lacking[:_SHOWN])}{more}"
            notes.append((peer, f"tells {has} of {len(names)} classes: none of {absent}"))
    return Agreement(text, notes)


def decode(text: str) -> tuple[str, ...]:
    """The agreed classes in `text`. Raises BadMessage."""
    try:
        return msgspec.json.decode(text.encode(), type=AgreedClasses).classes
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as err:
        raise BadMessage(f"not a valid list of classes: {err}") from err
