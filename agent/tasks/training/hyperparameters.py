"""The settings of local training and what they amount to in a round. Pure.

Setting       Default   Meaning
epochs        5         passes over this peer's examples
batch_size    10        examples a step; 0 or "all" is all of them
max_steps     0         stop after so many steps; 0 is no limit
optimiser     sgd       "sgd" or "adamw"
lr            0.1       learning rate
lr_schedule   constant  by round: "constant", or to 0 by "linear" or "cosine" over `lr_rounds`
lr_rounds     0
lr_decay      1.0       the learning rate's factor from round to round
warmup_rounds 0         rounds until the learning rate is whole
momentum      0.0       of sgd
weight_decay  0.0       sgd: times the weights to the gradient; adamw: apart from it
clip_norm     0.0       the largest norm of a step's gradient; 0 is no limit
proximal_mu   0.0       how strongly the first weights hold the others (FedProx)
precision     fp32      "bf16" where the device has it, "auto": wherever that is faster
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from agent.tasks import Setting, Settings, merge_settings
from protocols.errors import UnknownName, UsageError

#: The defaults, over which a task lays its own.
LOOP_DEFAULTS: Mapping[str, Setting] = {
    "epochs": 5,
    "batch_size": 10,
    "max_steps": 0,
    "optimiser": "sgd",
    "lr": 0.1,
    "lr_schedule": "constant",
    "lr_rounds": 0,
    "lr_decay": 1.0,
    "warmup_rounds": 0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "proximal_mu": 0.0,
    "precision": "fp32",
}
_CHOICES = {
    "optimiser": ("sgd", "adamw"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "precision": ("fp32", "bf16", "auto"),
}


class Hyperparameters(NamedTuple):
    """The settings of the loop, checked. `lr` is that of this round."""

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

    def steps(self, examples: int) -> int:
        """How many steps training on so many examples takes."""
        steps = self.epochs * -(-examples // (self.batch_size or examples))
        return min(steps, self.max_steps) if self.max_steps else steps


def resolve_settings(settings: Settings, defaults: Settings) -> dict[str, Setting]:
    """A task's settings, its own and those of the loop, over its defaults; "all" is 0.

    Raises UnknownName, UsageError.
    """
    if settings.get("batch_size") == "all":
        settings = {**settings, "batch_size": 0}
    return merge_settings(settings, defaults)


def read_hyperparameters(settings: Settings, defaults: Settings = LOOP_DEFAULTS) -> Hyperparameters:
    """The loop's part of a task's settings. Raises UnknownName, UsageError."""
    merged = resolve_settings(settings, defaults)
    number = {name: value for name, value in merged.items() if name not in _CHOICES}
    for name, choices in _CHOICES.items():
        if merged[name] not in choices:
            raise UnknownName(
                f"the setting {name} cannot be {merged[name]!r}", f"one of {', '.join(choices)}"
            )
    limits: dict[str, Callable[[float], bool]] = {
        "epochs": lambda n: n >= 1,
        "batch_size": lambda n: n >= 0,
        "max_steps": lambda n: n >= 0,
        "lr": _not_negative,
        "lr_rounds": lambda n: n >= (merged["lr_schedule"] != "constant"),
        "lr_decay": lambda n: 0 < n <= 1,
        "warmup_rounds": lambda n: n >= 0,
        "momentum": lambda n: 0 <= n < 1,
        "weight_decay": _not_negative,
        "clip_norm": _not_negative,
        "proximal_mu": _not_negative,
    }
    for name, held in limits.items():
        if not held(number[name]):  # type: ignore[arg-type]
            example = defaults[name] if held(defaults[name]) else 100  # type: ignore[arg-type]
            raise UsageError(
                f"the setting {name} cannot be {merged[name]}", f"such as {name}={example}"
            )
    round_number = int(settings.get("round", 0))
    merged["lr"] = float(merged["lr"]) * _lr_factor(merged, max(round_number, 1))
    merged |= {"seed": settings.get("seed", 0), "round": round_number}
    return Hyperparameters(**{name: merged[name] for name in Hyperparameters._fields})  # type: ignore[arg-type]


def _not_negative(number: float) -> bool:
    return 0 <= number < math.inf


def _lr_factor(settings: Mapping[str, Setting], number: int) -> float:
    """What the learning rate is multiplied by in round `number`, from 1."""
    factor = float(settings["lr_decay"]) ** (number - 1)
    if (warmup := int(settings["warmup_rounds"])) >= number:
        factor *= number / (warmup + 1)
    if settings["lr_schedule"] != "constant":
        passed = min((number - 1) / int(settings["lr_rounds"]), 1.0)
        linear = settings["lr_schedule"] == "linear"
        factor *= 1 - passed if linear else (1 + math.cos(math.pi * passed)) / 2
    return factor
