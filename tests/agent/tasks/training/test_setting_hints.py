"""The settings of a dataclass, and those of every built-in task, as agents tell them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from agent.tasks import registry
from agent.tasks.capabilities import TellsSettings
from protocols.errors import TaskUnusable
from protocols.model import built_in_settings, schema_card, setting_hints, setting_specs
from protocols.model.built_in_settings import LOOP
from protocols.model.setting_specs import SettingSpec


@dataclass
class Chosen:
    width: Annotated[int, Meta(ge=1, le=64, description="units")] = 4
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    kind: Literal["relu", "tanh"] = "relu"
    plain: bool = True
    lr: float = 0.02


def test_types_bounds_and_help_are_those_of_the_annotations() -> None:
    assert setting_hints.specs_of(Chosen) == {
        "width": SettingSpec(default=4, ge=1, le=64, help="units"),
        "share": SettingSpec(default=0.5, gt=0, lt=1),
        "kind": SettingSpec(default="relu", choices=("relu", "tanh")),
        "plain": SettingSpec(default=True),
        "lr": SettingSpec(default=0.02),
    }


def test_a_setting_of_the_loop_keeps_its_bounds_with_another_default() -> None:
    found = setting_hints.with_defaults(LOOP, setting_hints.specs_of(Chosen))
    assert found["lr"] == SettingSpec(default=0.02, ge=0, help=LOOP["lr"].help)
    assert (found["width"].le, found["epochs"]) == (64, LOOP["epochs"])


@pytest.mark.parametrize("default", [None, float("inf"), "x" * 401, "\x1b", field(default=None)])
def test_what_is_no_default_is_told(default: Any) -> None:
    kind = type("Settings", (), {"__annotations__": {"depth": "float"}, "depth": default})
    with pytest.raises(TaskUnusable, match="the setting depth has no default"):
        setting_hints.specs_of(dataclass(kind))


def test_the_coordinator_knows_every_built_in_task() -> None:
    assert built_in_settings.BY_TASK.keys() == registry.BUILT_IN.keys()
    for name, known in built_in_settings.BY_TASK.items():
        setting_specs.check({setting: spec.default for setting, spec in known.items()}, known)
        assert all(spec.help for spec in known.values()), name


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_built_in_task_tells_its_settings(name: str) -> None:
    try:
        task = registry.create(name)
    except TaskUnusable as err:
        pytest.skip(f"{err.message}: {err.hint}")
    assert isinstance(task, TellsSettings)
    told = task.setting_specs()
    assert told == built_in_settings.BY_TASK[name]
    assert {setting: spec.default for setting, spec in told.items()} == task.defaults  # type: ignore[attr-defined]
    card = schema_card.make_card(name, "1", {}, settings=told)
    assert schema_card.decode(schema_card.encode(card)) == card
