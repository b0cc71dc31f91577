"""The settings of a task: their types, bounds and help, as its peers tell them. Pure.

A peer makes them from the task's code, and the coordinator, which runs no task, checks `--set` by
them. They need not be equal on all peers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

from msgspec import Meta, Struct

from protocols.errors import UnknownName, UsageError
from protocols.messages.envelope import Integer, Name, Text

Value = Text | Integer | float | bool
#: Settings that every task takes; they are not its own.
RESERVED = frozenset({"seed", "round", "preprocessing", "min_batch", "masked"})
#: Words that stand for 0 in a setting that is a whole number.
_WORDS = frozenset({("batch_size", "all"), ("rank", "auto")})
MAX_CHOICES = 64


class SettingSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One setting. Values have the type of `default`. A number is at least `ge` and at most `le`,
    above `gt` and below `lt`; a text is one of `choices`, if there are any."""

    default: Value
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Annotated[tuple[Text, ...], Meta(max_length=MAX_CHOICES)] = ()
    help: Text = ""

    def allows(self, value: Value) -> bool:
        """True for a value within the bounds. No number is infinite."""
        if isinstance(value, str):
            return not self.choices or value in self.choices
        return (
            not (isinstance(value, float) and not math.isfinite(value))
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def limits(self) -> str:
        """The values that it may have, in words; empty for all of its type."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return ", ".join(f"{word} {n:g}" for word, n in words.items() if n is not None)


#: By name.
SettingSpecs = Annotated[dict[Name, SettingSpec], Meta(max_length=256)]


def of_type(name: str, value: Value, default: Value) -> Value:
    """The value in the type of `default`; text is parsed. Raises UsageError."""
    kind = type(default)
    try:
        if isinstance(value, str) and kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if isinstance(value, str) or (kind is float and type(value) is int):
            return kind(value)
    except (ValueError, KeyError, OverflowError):
        pass  # raised below, as for every other invalid value
    else:
        if type(value) is kind:
            return value
    raise UsageError(f"the setting {name} cannot be {value!r}", f"such as {name}={default}")


def means_zero(name: str, value: Value, default: Value) -> bool:
    """True for a word in place of 0, such as `batch_size=all`."""
    return (name, value) in _WORDS and type(default) is int


def check(settings: Mapping[str, Value], known: Mapping[str, SettingSpec]) -> None:
    """Raise UnknownName or UsageError for the first setting that is not among the known ones."""
    for name, value in settings.items():
        if name in RESERVED or (name in known and means_zero(name, value, known[name].default)):
            continue
        if name not in known:
            raise UnknownName(
                f"the task has no setting {name!r}", f"its settings: {', '.join(sorted(known))}"
            )
        spec = known[name]
        if not spec.allows(of_type(name, value, spec.default)):
            raise (UnknownName if spec.choices else UsageError)(
                f"the setting {name} cannot be {value!r}",
                f"{spec.limits or 'a finite number'}, such as {name}={spec.default}",
            )


def explain(known: Mapping[str, SettingSpec]) -> Iterator[tuple[str, str, str]]:
    """Of each setting: its name and default, what it may be, and its help."""
    for name, spec in sorted(known.items()):
        default = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
        kind = {str: "text", bool: "true or false", int: "whole number"}.get(type(spec.default))
        yield f"{name}={default}", spec.limits or kind or "number", spec.help
