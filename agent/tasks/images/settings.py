"""The settings of the task "images", for every framework. Pure."""

from __future__ import annotations

from typing import NamedTuple

from agent.tasks import Settings
from agent.tasks.images import layer_spec
from agent.tasks.images.layer_spec import Layer
from agent.tasks.training import class_folders, task_settings
from protocols.errors import UsageError
from protocols.model.built_in_settings import BY_TASK, ImageSettings
from protocols.tables import class_names

RESNET = "resnet18"
CNN = "conv 32 3, pool, conv 64 3, pool, conv 128 3, pool, dense 128"


class ImagePlan(NamedTuple):
    """The settings, checked. `network` is a text for `layer_spec`, or RESNET.

    `agreed`: the classes are those that the peers agreed on, not named by the run.
    """

    classes: tuple[str, ...]
    agreed: bool
    network: str
    size: int
    channels: int
    flip: bool
    norm: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of a network that is not RESNET. Raises UsageError."""
        return layer_spec.parse_layers(self.network, self.channels, self.size, len(self.classes))


def needs_classes(settings: Settings) -> bool:
    """True if the peers have yet to agree on the classes."""
    return not (str(settings.get("classes", "")).strip() or settings.get("preprocessing"))


def read_settings(settings: Settings) -> ImagePlan:
    """The settings of pictures and model. Raises UsageError, UnknownName, BadMessage."""
    read = task_settings.read(settings, BY_TASK["images"], ImageSettings)
    named, agreed = read.classes, str(settings.get("preprocessing", ""))
    is_agreed = bool(agreed) and not named.strip()
    plan = ImagePlan(
        class_names.decode(agreed) if is_agreed else class_folders.parse_classes(named),
        is_agreed,
        {"cnn": CNN}.get(read.model, read.model),
        read.size,
        read.channels,
        read.flip,
        read.norm,
    )
    if plan.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, not {plan.channels}", "channels=3")
    return plan
