"""The settings of a user's task: those of the training loop, and its own from a dataclass.

@dataclass
class Settings:
    width: Annotated[int, Meta(ge=1, le=512, description="units of the hidden layer")] = 32
    activation: Literal["relu", "gelu"] = "relu"
    lr: float = 0.01        # another default for a setting of the loop
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from agent.tasks import Setting, Settings
from agent.tasks.training.hyperparameters import LOOP, read_hyperparameters, resolve_settings
from agent.tasks.training.setting_hints import can_travel, specs_of
from protocols.errors import TaskUnusable, UsageError
from protocols.model.setting_specs import SettingSpec


class TaskSettings(Mapping[str, Any]):
    """All settings of a task: `settings["lr"]` or `settings.lr`, which is that of this round."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"the task has no setting {name!r}: {', '.join(sorted(values))}")
        return values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def merged_defaults(task: type) -> dict[str, Setting]:
    """The defaults of a task: those of its base class, its `defaults`, and of its `Settings`."""
    own, base = vars(task), task.__mro__[1]
    return {
        **getattr(base, "defaults", {}),
        **own.get("defaults", {}),
        **{name: spec.default for name, spec in specs_of(own.get("Settings")).items()},
    }


def specs(defaults: Settings, kind: type | None = None) -> dict[str, SettingSpec]:
    """All settings of a task: those of its dataclass, of the training loop, and any others."""
    own = {name: one for name, one in specs_of(kind).items() if one.limits or one.help}
    known = {**LOOP, **own}
    return {
        name: replace(known.get(name) or SettingSpec(default=default), default=default)
        for name, default in defaults.items()
        if can_travel(default)
    }


def read_own(settings: Settings, defaults: Settings, kind: type | None) -> dict[str, Any]:
    """All settings, checked by `kind`. Raises UnknownName, UsageError."""
    merged: dict[str, Any] = resolve_settings(settings, defaults)
    for field in dataclasses.fields(kind) if kind else ():
        name = field.name
        merged[name] = _checked(name, merged[name], defaults[name], kind)
    return merged


def read(settings: Settings, defaults: Settings, kind: type | None) -> TaskSettings:
    """All settings, checked by the loop's rules and by `kind`. Raises UnknownName, UsageError."""
    merged, plan = read_own(settings, defaults, kind), read_hyperparameters(settings, defaults)
    return TaskSettings({**merged, "lr": plan.lr, "seed": plan.seed, "round": plan.round})


def _checked(name: str, value: Setting, default: Setting, kind: type | None) -> Any:
    hint = typing.get_type_hints(kind, include_extras=True)[name]
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as err:
        raise UsageError(
            f"the setting {name} cannot be {value!r}: {str(err)[:1].lower()}{str(err)[1:]}",
            f"such as {name}={default}",
        ) from err


def lacks(task: object, method: str) -> TaskUnusable:
    """The error of a task without a method that it needs."""
    return TaskUnusable(f"{type(task).__name__} has no method {method}", "docs/tasks.md has a task")
