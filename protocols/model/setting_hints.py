"""The settings of a dataclass: types, bounds and help from its annotations. Pure.

@dataclass
class Settings:
    width: Annotated[int, Meta(ge=1, le=512, description="units of the hidden layer")] = 32
    activation: Literal["relu", "gelu"] = "relu"
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from msgspec import inspect
from msgspec.structs import replace

from protocols.errors import TaskUnusable
from protocols.messages.envelope import strip_controls
from protocols.model.setting_specs import SettingSpec

_BOUNDS = ("ge", "gt", "le", "lt")


def specs_of(kind: type | None) -> dict[str, SettingSpec]:
    """The settings of a dataclass by name. Raises TaskUnusable."""
    if kind is None:
        return {}
    if not dataclasses.is_dataclass(kind):
        raise TaskUnusable("Settings is no dataclass", "@dataclass before class Settings")
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except NameError as err:
        raise TaskUnusable(f"a type in Settings is not known: {err}", "import it above") from err
    return {field.name: _spec(field, hints[field.name]) for field in dataclasses.fields(kind)}


def with_defaults(
    known: Mapping[str, SettingSpec], own: Mapping[str, SettingSpec]
) -> dict[str, SettingSpec]:
    """Settings that are known, and a task's own. One with nothing but another default keeps the
    bounds and the help of the known one."""
    return {**known} | {
        name: replace(known[name], default=spec.default)
        if name in known and not (spec.limits or spec.help)
        else spec
        for name, spec in own.items()
    }


def _spec(field: dataclasses.Field[Any], hint: Any) -> SettingSpec:
    default = field.default
    if not isinstance(default, str | int | float | bool) or not can_travel(default):
        raise TaskUnusable(
            f"the setting {field.name} has no default that is a text, a number, true or false",
            f"such as {field.name}: int = 1",
        )
    found, help_text = inspect.type_info(hint), ""
    if isinstance(found, inspect.Metadata):
        help_text = (found.extra_json_schema or {}).get("description", "")
        found = found.type
    bounds = {name: getattr(found, name, None) for name in _BOUNDS}
    choices = tuple(map(str, found.values)) if isinstance(found, inspect.LiteralType) else ()
    return SettingSpec(default=default, **bounds, choices=choices, help=strip_controls(help_text))


def can_travel(default: str | float) -> bool:
    """True for a default that JSON and terminals can have: no long text, and no infinity."""
    if isinstance(default, str):
        return default == strip_controls(default)
    return math.isfinite(default)
