"""Settings of a program: flag, then environment, then settings file, then default.

msgspec validates them, because it is loaded anyway and an idle agent must stay small.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from filelock import FileLock, Timeout

from protocols.errors import HomeLocked, UsageError

S = TypeVar("S", bound=msgspec.Struct)

SETTINGS_FILE = "settings.toml"
_LOCK_FILE, _LOCK_TIMEOUT_S = "settings.lock", 10.0


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Lock what commands change in a home, from reading it to writing it. Raises HomeLocked.

    May be nested in one thread.
    """
    lock = FileLock(home / _LOCK_FILE, mode=0o600, is_singleton=True)
    try:
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout as err:
        raise HomeLocked(
            f"another command has been changing the settings in {home} for {_LOCK_TIMEOUT_S:g} s",
            "wait for it or end it, and try again",
        ) from err
    try:
        yield
    finally:
        lock.release()


def read_file(home: Path) -> dict[str, Any]:
    """The settings in the file of a home; none without a file. Raises UsageError."""
    try:
        return tomllib.loads((home / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}  # a home that is a file is reported where it is opened
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read {home / SETTINGS_FILE}: {err}") from err


def read_environment(
    kind: type[msgspec.Struct], prefix: str, parse: Callable[[str, str], Any]
) -> dict[str, Any]:
    """The settings of `kind` in the environment: `prefix` and the name in capitals.

    `parse(name, text)` gives the value. Raises UsageError.
    """
    texts = {name: os.environ.get(prefix + name.upper()) for name in kind.__struct_fields__}
    found = {name: parse(name, text) for name, text in texts.items() if text is not None}
    for name, value in found.items():  # a wrong one is named, not the file
        validate({name: value}, kind, f"correct the environment variable {prefix}{name.upper()}")
    return found


def validate(values: Mapping[str, Any], kind: type[S], hint: str) -> S:
    """The settings with these values; the others have their defaults. Raises UsageError."""
    try:
        chosen = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as err:
        raise UsageError(_error_text(str(err), values, kind), hint) from err
    for name in kind.__struct_fields__:  # no bound of a type refuses NaN, or infinity as a maximum
        value = getattr(chosen, name)
        if isinstance(value, float) and not math.isfinite(value):
            wanted = _wanted(get_type_hints(kind, include_extras=True)[name])
            raise UsageError(f"{name} must be {wanted}; not {value}", hint)
    return chosen


def unknown_text(name: str, kind: type[msgspec.Struct]) -> str:
    """That there is no such setting, and the nearest one."""
    near = difflib.get_close_matches(name, kind.__struct_fields__, 1)
    return f"there is no setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")


def _error_text(error: str, values: Mapping[str, Any], kind: type[msgspec.Struct]) -> str:
    """Turn msgspec's error into a sentence about the setting."""
    if unknown := re.search(r"unknown field `(.*?)`", error):
        return unknown_text(unknown[1], kind)
    why, _, place = error.partition(" - at `$.")
    name = place.rstrip("`").partition("[")[0]
    if name not in values:
        return f"a setting is wrong: {error}"
    hint = get_type_hints(kind, include_extras=True)[name]
    if "matching" in why and (about := _description(hint)):
        return f"{name} cannot be {values[name]!r}; it takes a {about}"
    if wanted := _wanted(hint):
        return f"{name} must be {wanted}; not {values[name]!r}"
    return f"{name} is wrong: {why}, not {values[name]!r}"


def _description(hint: Any) -> str:
    """The description of a setting; empty without one."""
    metas = getattr(hint, "__metadata__", ())
    return next((meta.description for meta in metas if meta.description), None) or ""


def _wanted(hint: Any) -> str:
    """The numbers or words that a setting takes, as text; empty for other types."""
    from msgspec import inspect  # an idle agent does not need it

    found = inspect.type_info(hint)
    while isinstance(found, inspect.Metadata):
        found = found.type
    if isinstance(found, inspect.LiteralType):
        words = get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)
        return f"one of {', '.join(words)}"
    if isinstance(found, inspect.BoolType):
        return "true or false"
    if isinstance(found, inspect.StrType):
        return f"text that matches {found.pattern}" if found.pattern else "text"
    if isinstance(found, inspect.ListType | inspect.VarTupleType):
        return "a list of texts"
    if isinstance(found, inspect.DictType):
        return "a table of names and values"
    if not isinstance(found, inspect.IntType | inspect.FloatType):
        return ""
    parts = ["a whole number" if isinstance(found, inspect.IntType) else "a number"]
    for bound, text in (
        (found.ge, "at least"),
        (found.gt, "more than"),
        (found.le, "at most"),
        (found.lt, "less than"),
    ):
        parts += [f"{text} {bound:g}"] if bound is not None else []
    return ", ".join(parts)
