"""The settings of the task "lora". Pure."""

from __future__ import annotations

from typing import NamedTuple

from agent.tasks import Settings
from agent.tasks.training import class_folders, task_settings
from protocols.errors import UsageError
from protocols.model.built_in_settings import BY_TASK, LoraSettings


class LoraPlan(NamedTuple):
    """The settings, checked. `classes` is empty for a causal model."""

    model: str
    kind: str
    classes: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float
    targets: str
    context: int
    micro_batch: int
    checkpointing: bool


def read_settings(settings: Settings) -> LoraPlan:
    """The settings of model and adapters. Raises UsageError, UnknownName."""
    merged = task_settings.read(settings, BY_TASK["lora"], LoraSettings)
    if not merged["model"]:
        raise UsageError(
            "a run of lora names its base model", "the folder's name: --set model=NAME"
        )
    is_classification = merged["kind"] == "classification"
    classes = class_folders.parse_classes(str(merged["classes"])) if is_classification else ()
    fields = {name: merged[name] for name in LoraPlan._fields}
    return LoraPlan(**{**fields, "classes": classes})
