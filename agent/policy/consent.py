"""An owner's consent to a task: the columns that it may use, the purpose, and the code. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_PURPOSE_CHARS = 200

#: What an owner still has to decide about a task that the operator offers. `offered`: the offered
#: file, which is new or replaces an approved one. `withdrawn`: whether the file that the owner
#: approved stays in use without the offer.
Review = Literal["", "offered", "withdrawn"]
#: `changed`: the task's file is no longer the one that the owner allowed. `columns`: the owner
#: allows it, and has not said which columns it may use.
Standing = Literal["allowed", "forbidden", "awaiting", "changed", "columns", "offered", "withdrawn"]

#: The owner is asked before such a task runs.
ASKED_FIRST: frozenset[Standing] = frozenset(
    {"awaiting", "changed", "columns", "offered", "withdrawn"}
)
#: Built-in tasks that read the columns of the owner's table. Their settings `target` and `features`
#: name columns.
USES_COLUMNS = frozenset({"tabular"})


class Consent(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The terms on which an owner allowed a task.

    `columns`: patterns of columns that the task may use, among those of `data_columns`; empty: all
    of these. `awaits_columns`: none before the owner names them, here or in `data_columns`; older
    versions allowed all. `purpose`: the owner's note. `code`: SHA-256 of the task's file and of the
    modules beside it that it imports; empty for installed tasks. `at`: Unix s. `offer`: SHA-256 of
    the offered file that the owner approved; empty for the owner's own. `review`: not in the file;
    `agent.home.task_offers` sets it by the operator's present offers.
    """

    columns: tuple[str, ...] = ()
    awaits_columns: bool = False
    purpose: Annotated[str, Meta(max_length=MAX_PURPOSE_CHARS)] = ""
    code: str = ""
    at: float = 0.0
    offer: str = ""
    review: Review = ""


def narrow(columns: Sequence[str], within: Sequence[str]) -> tuple[str, ...]:
    """The patterns of `columns` that stay within the patterns `within`; all of these if empty.

    A pattern with `*` counts only if the other list has it too, or has `*` itself: no pattern
    allows more than both lists do.
    """
    if not columns:
        return tuple(within)
    return tuple(
        pattern
        for pattern in columns
        if "*" in within or pattern in within or (is_name(pattern) and matches(pattern, within))
    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """True if one of the patterns allows a column of this name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_name(pattern: str) -> bool:
    """True if a pattern matches one column only, that of this name."""
    return not set(pattern) & set("*?[")
