"""The settings of local training. Pure. `protocols.model.built_in_settings` has their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from agent.tasks import Setting, Settings, merge_settings
from protocols.errors import UsageError
from protocols.model import setting_specs
from protocols.model.built_in_settings import LOOP

LOOP_DEFAULTS: Mapping[str, Setting] = {name: spec.default for name, spec in LOOP.items()}


class Hyperparameters(NamedTuple):
    """The settings of the loop, checked. `lr` is that of this round, `min_batch` the owner's."""

    epochs: int
    batch_size: int
    max_steps: int
    optimiser: str
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float
    proximal_mu: float
    precision: str
    seed: int
    round: int
    min_batch: int = 1

    def steps(self, examples: int) -> int:
        """The number of steps of training on this many examples."""
        an_epoch = -(-examples // (self.batch_size or examples)) - (self.tail(examples) > 0)
        steps = self.epochs * an_epoch
        return min(steps, self.max_steps) if self.max_steps else steps

    def tail(self, examples: int) -> int:
        """The rows of an epoch's last batch where it is larger than the others; 0 where not.

        A last batch below the owner's minimum joins the one before.
        """
        size = self.batch_size or examples
        whole, rest = divmod(examples, size)
        return size + rest if whole and 0 < rest < self.min_batch else 0


def resolve_settings(settings: Settings, defaults: Settings) -> dict[str, Setting]:
    """All settings of a task, including those of the loop; a batch size of "all" is 0.

    Raises UnknownName, UsageError.
    """
    plain = {
        name: 0 if setting_specs.means_zero(name, value, defaults.get(name, "")) else value
        for name, value in settings.items()
    }
    return merge_settings(plain, defaults)


def read_hyperparameters(settings: Settings, defaults: Settings = LOOP_DEFAULTS) -> Hyperparameters:
    """The loop's part of a task's settings. Raises UnknownName, UsageError."""
    merged = resolve_settings(settings, defaults)
    setting_specs.check({name: merged[name] for name in LOOP}, LOOP)
    if merged["lr_schedule"] != "constant" and not merged["lr_rounds"]:
        raise UsageError("the setting lr_rounds cannot be 0", "such as lr_rounds=100")
    round_number = int(settings.get("round", 0))
    merged["lr"] = float(merged["lr"]) * _lr_factor(merged, max(round_number, 1))
    merged |= {"seed": settings.get("seed", 0), "round": round_number}
    merged["min_batch"] = int(settings.get("min_batch", 1))
    return Hyperparameters(**{name: merged[name] for name in Hyperparameters._fields})  # type: ignore[arg-type]


def _lr_factor(settings: Mapping[str, Setting], number: int) -> float:
    """The factor of the learning rate in round `number`, from 1."""
    factor = float(settings["lr_decay"]) ** (number - 1)
    if (warmup := int(settings["warmup_rounds"])) >= number:
        factor *= number / (warmup + 1)
    if settings["lr_schedule"] != "constant":
        passed = min((number - 1) / int(settings["lr_rounds"]), 1.0)
        linear = settings["lr_schedule"] == "linear"
        factor *= 1 - passed if linear else (1 + math.cos(math.pi * passed)) / 2
    return factor
