"""The settings of the task "lora". Pure.

Setting       Default  Meaning
model                  name of the base model's folder, in the folder `models` of every peer
kind          causal   "causal": the next token of text files; "classification": of texts in a
                       folder for each class
classes                of a classification: the folders' names, in the order of the labels
rank          8        r of LoRA (Hu et al. 2021, arXiv 2106.09685)
alpha         16       the adapters are scaled by alpha / rank
dropout       0.0      before the adapters
targets                layers that get adapters, "q_proj,v_proj" or "all-linear"; empty: those that
                       PEFT takes for models of this kind
context       128      tokens of an example
micro_batch   0        texts of a step that are computed at a time, to need less memory; 0 is all
checkpointing false    compute activations again for the gradients, to need less memory
and those of `hyperparameters`; the optimizer is adamw.
"""

from __future__ import annotations

from typing import NamedTuple

from agent.tasks import Settings
from agent.tasks.training import class_folders
from agent.tasks.training.hyperparameters import TaskOptions, anything, at_least, fraction
from protocols.errors import UsageError

_OPTIONS = TaskOptions(
    {
        "model": ("", anything),
        "kind": ("causal", ("causal", "classification")),
        "classes": ("", anything),
        "rank": (8, at_least(1)),
        "alpha": (16.0, lambda alpha: alpha > 0),
        "dropout": (0.0, fraction),
        "targets": ("", anything),
        "context": (128, at_least(2)),
        "micro_batch": (0, at_least(0)),
        "checkpointing": (False, anything),
    },
    epochs=1,
    batch_size=8,
    optimiser="adamw",
    lr=1e-3,
)
DEFAULTS = _OPTIONS.defaults


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
    micro_batch: int
    checkpointing: bool


def read_settings(settings: Settings) -> LoraSettings:
    """The settings of model and adapters. Raises UsageError, UnknownName."""
    merged = _OPTIONS.read(settings)
    if not merged["model"]:
        raise UsageError(
            "a run of lora names its base model", "the folder's name: --set model=NAME"
        )
    is_classification = merged["kind"] == "classification"
    classes = class_folders.parse_classes(str(merged["classes"])) if is_classification else ()
    fields = {name: merged[name] for name in LoraSettings._fields}
    return LoraSettings(**{**fields, "classes": classes})  # type: ignore[arg-type]
