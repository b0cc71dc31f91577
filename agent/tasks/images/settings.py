"""The settings of the task "images", for every framework. Pure.

Setting     Default  Meaning
classes              the folders' names, in the order of the labels; default: those of all peers
model       cnn      "cnn", "resnet18", or a network as `layer_spec` declares them
size        64       pictures are scaled to a square with this many pixels a side
channels    3        3 for color, 1 for gray
flip        true     mirror a random half of the pictures in each epoch
norm        group    of resnet18: "group", which does not mix the statistics of peers whose pictures
                     differ (Hsieh et al. 2020, arXiv 1910.00189), or "batch", as published
and those of `hyperparameters`.
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
from protocols.errors import UsageError
from protocols.tables import class_names

RESNET = "resnet18"
CNN = "conv 32 3, pool, conv 64 3, pool, conv 128 3, pool, dense 128"

DEFAULTS: dict[str, Setting] = {
    **LOOP_DEFAULTS,
    "classes": "",
    "model": "cnn",
    "size": 64,
    "channels": 3,
    "flip": True,
    "norm": "group",
    "epochs": 1,
    "batch_size": 32,
    "lr": 0.01,
    "momentum": 0.9,
}


class ImageSettings(NamedTuple):
    """The settings, checked. `network` is what `layer_spec` can parse, or RESNET.

    `agreed`: the classes are those that the peers agreed on, not named by the run.
    """

    classes: tuple[str, ...]
    agreed: bool
    network: str
    size: int
    channels: int
    flip: bool
    norm: str


def needs_classes(settings: Settings) -> bool:
    """True if the peers have yet to agree on the classes."""
    return not (str(settings.get("classes", "")).strip() or settings.get("preprocessing"))


def read_settings(settings: Settings) -> ImageSettings:
    """The settings of pictures and model. Raises UsageError, UnknownName, BadMessage."""
    read_hyperparameters(settings, DEFAULTS)  # so that its errors show early too
    merged = resolve_settings(settings, DEFAULTS)
    named, agreed = str(merged["classes"]), str(settings.get("preprocessing", ""))
    is_agreed = bool(agreed) and not named.strip()
    plan = ImageSettings(
        class_names.decode(agreed) if is_agreed else class_folders.parse_classes(named),
        is_agreed,
        {"cnn": CNN}.get(str(merged["model"]), str(merged["model"])),
        int(merged["size"]),
        int(merged["channels"]),
        bool(merged["flip"]),
        str(merged["norm"]),
    )
    if not 8 <= plan.size <= 1024:
        raise UsageError(f"pictures cannot have the size {plan.size}", "from 8 to 1024")
    if plan.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, not {plan.channels}", "channels=3")
    if plan.norm not in ("group", "batch"):
        raise UsageError(f"the norm cannot be {plan.norm!r}", "norm=group or norm=batch")
    return plan
