"""The settings of a dataclass, and those of every built-in task, as agents tell them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from agent.tasks import TellsSettings, registry
from agent.tasks.training import setting_hints, task_settings
from agent.tasks.training.hyperparameters import LOOP
from protocols.errors import TaskUnusable
from protocols.model import schema_card
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
    found = task_settings.specs({"lr": 0.02, "width": 4, "extra": "a"}, Chosen)
    assert found["lr"] == SettingSpec(default=0.02, ge=0, help=LOOP["lr"].help)
    assert (found["width"].le, found["extra"]) == (64, SettingSpec(default="a"))


@pytest.mark.parametrize("default", [None, float("inf"), "x" * 401, "\x1b", field(default=None)])
def test_what_is_no_default_is_told(default: Any) -> None:
    kind = type("Settings", (), {"__annotations__": {"depth": "float"}, "depth": default})
    with pytest.raises(TaskUnusable, match="the setting depth has no default"):
        setting_hints.specs_of(dataclass(kind))


@pytest.mark.parametrize("name", ["images", "lora", "mnist", "motion", "tabular", "text-lm"])
def test_every_built_in_task_tells_its_settings(name: str) -> None:
    try:
        task = registry.create(name)
    except TaskUnusable as err:
        pytest.skip(f"{err.message}: {err.hint}")
    assert isinstance(task, TellsSettings)
    told = task.setting_specs()
    assert told.keys() == task.defaults.keys()  # type: ignore[attr-defined]
    card = schema_card.make_card(name, "1", {}, settings=told)
    assert schema_card.decode(schema_card.encode(card)) == card
