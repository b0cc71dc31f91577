"""The settings of a user's task: those of the training loop, and its own from a dataclass.

@dataclass
class Settings:
    width: Annotated[int, Meta(ge=1, le=512, description="units of the hidden layer")] = 32
    activation: Literal["relu", "gelu"] = "relu"
    lr: float = 0.01        # another default for a setting of the loop
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import msgspec

from agent.tasks import Setting, Settings
from agent.tasks.training.hyperparameters import read_hyperparameters, resolve_settings
from protocols.errors import TaskUnusable, UsageError
from protocols.model import setting_specs
from protocols.model.setting_hints import can_travel, specs_of, with_defaults
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


class WithSettings:
    """A task whose subclasses add settings: by a dataclass `Settings`, or by plain `defaults`.

    A base class says its own ones as `_known`.
    """

    #: A dataclass with the task's own settings, and other defaults for those of the base class.
    Settings: ClassVar[type | None] = None
    defaults: Mapping[str, Setting] = {}
    _known: Mapping[str, SettingSpec] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "_known" not in own:
            plain = {name: SettingSpec(default=v) for name, v in own.get("defaults", {}).items()}
            known = with_defaults(cls._known, plain)
            cls._known = with_defaults(known, specs_of(own.get("Settings")))
        cls.defaults = defaults_of(cls._known)


def defaults_of(known: Mapping[str, SettingSpec]) -> dict[str, Setting]:
    """The defaults by name."""
    return {name: spec.default for name, spec in known.items()}


def shareable(known: Mapping[str, SettingSpec]) -> dict[str, SettingSpec]:
    """Those that a handshake can have."""
    return {name: spec for name, spec in known.items() if can_travel(spec.default)}


def read_own(
    settings: Settings, known: Mapping[str, SettingSpec], kind: type | None
) -> dict[str, Any]:
    """All settings, checked by their bounds and by `kind`. Raises UnknownName, UsageError."""
    merged: dict[str, Any] = resolve_settings(settings, defaults_of(known))
    setting_specs.check(settings, known)
    for field in dataclasses.fields(kind) if kind else ():
        merged[field.name] = _checked(field.name, merged[field.name], known[field.name], kind)
    return merged


def read(settings: Settings, known: Mapping[str, SettingSpec], kind: type | None) -> TaskSettings:
    """All settings, checked by the loop's rules too. Raises UnknownName, UsageError."""
    merged = read_own(settings, known, kind)
    plan = read_hyperparameters(settings, defaults_of(known))
    agreed = {"preprocessing": settings.get("preprocessing", "")}
    return TaskSettings({**merged, **agreed, "lr": plan.lr, "seed": plan.seed, "round": plan.round})


_hints = functools.cache(partial(typing.get_type_hints, include_extras=True))


def _checked(name: str, value: Setting, known: SettingSpec, kind: type | None) -> Any:
    try:
        return msgspec.convert(value, _hints(kind)[name])
    except msgspec.ValidationError as err:
        raise UsageError(
            f"the setting {name} cannot be {value!r}: {str(err)[:1].lower()}{str(err)[1:]}",
            f"such as {name}={known.default}",
        ) from err


def lacks(task: object, method: str) -> TaskUnusable:
    """The error of a task without a method that it needs."""
    return TaskUnusable(f"{type(task).__name__} has no method {method}", "docs/tasks.md has a task")
