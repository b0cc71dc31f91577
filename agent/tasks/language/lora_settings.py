"""What a run asks of a base model: the settings of the task "lora". Pure.

Setting     Default  Meaning
model                name of the base model's folder, in the folder `models` of every peer
kind        causal   "causal": the next token of text files; "classification": of texts in a folder
                     for each class
classes              of a classification: the folders' names, in the order of the labels
rank        8        r of LoRA (Hu et al. 2021, arXiv 2106.09685)
alpha       16       the adapters count alpha / rank
dropout     0.0      before the adapters
targets              layers that get adapters, "q_proj,v_proj" or "all-linear"; empty: those that
                     PEFT takes for models of this kind
context     128      tokens of an example
and those of `plan`; the optimiser is adamw.
"""

from __future__ import annotations

from typing import NamedTuple

from agent.tasks import Setting, Settings
from agent.tasks.training import class_folders
from agent.tasks.training.hyperparameters import (
    LOOP_DEFAULTS,
    read_hyperparameters,
    resolve_settings,
)
from protocols.errors import UnknownName, UsageError

KINDS = ("causal", "classification")
DEFAULTS: dict[str, Setting] = {
    **LOOP_DEFAULTS,
    "model": "",
    "kind": "causal",
    "classes": "",
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.0,
    "targets": "",
    "context": 128,
    "epochs": 1,
    "batch_size": 8,
    "optimiser": "adamw",
    "lr": 1e-3,
}


class LoraSettings(NamedTuple):
    """The settings, checked. `classes` is empty for a causal model."""

    model: str
    kind: str
    classes: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float
    targets: str
    context: int


def read_settings(settings: Settings) -> LoraSettings:
    """The settings that are about model and adapters. Raises UsageError, UnknownName."""
    read_hyperparameters(settings, DEFAULTS)  # what the loop cannot do is told as early
    merged = resolve_settings(settings, DEFAULTS)
    if merged["kind"] not in KINDS:
        raise UnknownName(f"there is no kind {merged['kind']!r}", f"kinds: {', '.join(KINDS)}")
    if not merged["model"]:
        raise UsageError(
            "a run of lora names its base model", "the folder's name: --set model=NAME"
        )
    if merged["kind"] == "classification":
        merged["classes"] = class_folders.parse_classes(str(merged["classes"]))  # type: ignore[assignment]
    plan = LoraSettings(**{name: merged[name] for name in LoraSettings._fields})  # type: ignore[arg-type]
    limits = {
        "rank": plan.rank >= 1,
        "alpha": plan.alpha > 0,
        "dropout": 0 <= plan.dropout < 1,
        "context": plan.context >= 2,
    }
    for name, held in limits.items():
        if not held:
            raise UsageError(
                f"the setting {name} cannot be {merged[name]}", f"such as {name}={DEFAULTS[name]}"
            )
    return plan if plan.classes else plan._replace(classes=())
