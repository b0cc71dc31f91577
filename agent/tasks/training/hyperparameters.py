"""The settings of local training. Pure.

Setting       Default   Meaning
epochs        5         passes over this peer's examples
batch_size    10        examples per step; 0 or "all" is all of them
max_steps     0         stop after this many steps; 0 is no limit
optimiser     sgd       "sgd" or "adamw"
lr            0.1       learning rate
lr_schedule   constant  over rounds: "constant", or "linear" or "cosine" to 0 over `lr_rounds`
lr_rounds     0
lr_decay      1.0       factor of the learning rate from round to round
warmup_rounds 0         rounds until the full learning rate is reached
momentum      0.0       of sgd
weight_decay  0.0       sgd: added to the gradient, times the weights; adamw: decoupled
clip_norm     0.0       the largest norm of a step's gradient; 0 is no limit
proximal_mu   0.0       strength of the pull towards the first weights (FedProx)
precision     auto      "fp32", "tf32", "bf16" or "fp16"; "auto" is bf16 on a graphics card, or fp16
                        if it has no bf16, and fp32 elsewhere (see `precision`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from agent.tasks import Setting, Settings, merge_settings
from protocols.errors import UnknownName, UsageError

#: The valid values of a setting: a test, or the choices.
Valid = Callable[[Any], bool] | tuple[str, ...]


def at_least(minimum: float) -> Callable[[float], bool]:
    return lambda value: value >= minimum


def fraction(value: float) -> bool:
    return 0 <= value < 1


def _finite(value: float) -> bool:
    return 0 <= value < math.inf


def anything(value: object) -> bool:
    return True


#: The default of a setting and its valid values.
Option = tuple[Setting, Valid]

#: The settings of the training loop. Tasks override defaults.
_OPTIONS: dict[str, Option] = {
    "epochs": (5, at_least(1)),
    "batch_size": (10, at_least(0)),
    "max_steps": (0, at_least(0)),
    "optimiser": ("sgd", ("sgd", "adamw")),
    "lr": (0.1, _finite),
    "lr_schedule": ("constant", ("constant", "linear", "cosine")),
    "lr_rounds": (0, at_least(0)),
    "lr_decay": (1.0, lambda factor: 0 < factor <= 1),
    "warmup_rounds": (0, at_least(0)),
    "momentum": (0.0, fraction),
    "weight_decay": (0.0, _finite),
    "clip_norm": (0.0, _finite),
    "proximal_mu": (0.0, _finite),
    "precision": ("auto", ("auto", "fp32", "tf32", "bf16", "fp16")),
}
LOOP_DEFAULTS: Mapping[str, Setting] = {name: default for name, (default, _) in _OPTIONS.items()}
_VALID: Mapping[str, Valid] = {name: valid for name, (_, valid) in _OPTIONS.items()}


class TaskOptions:
    """The settings of a task: its `own`, and those of the training loop with other defaults."""

    def __init__(self, own: Mapping[str, Option], **loop_defaults: Setting) -> None:
        own_defaults = {name: default for name, (default, _) in own.items()}
        self.defaults: Mapping[str, Setting] = {**LOOP_DEFAULTS, **own_defaults, **loop_defaults}
        self._valid = {name: valid for name, (_, valid) in own.items()}

    def read(self, settings: Settings) -> dict[str, Setting]:
        """All settings, checked. Raises UnknownName, UsageError."""
        read_hyperparameters(settings, self.defaults)
        merged = resolve_settings(settings, self.defaults)
        check_values(merged, self._valid, self.defaults)
        return merged


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
    if settings.get("batch_size") == "all":
        settings = {**settings, "batch_size": 0}
    return merge_settings(settings, defaults)


def check_values(settings: Settings, valid: Mapping[str, Valid], defaults: Settings) -> None:
    """Raise UnknownName or UsageError for the first setting with an invalid value."""
    for name, test in valid.items():
        value = settings[name]
        if isinstance(test, tuple):
            if value not in test:
                raise UnknownName(
                    f"the setting {name} cannot be {value!r}", f"one of {', '.join(test)}"
                )
        elif not test(value):
            example = defaults[name] if test(defaults[name]) else 100
            raise UsageError(f"the setting {name} cannot be {value}", f"such as {name}={example}")


def read_hyperparameters(settings: Settings, defaults: Settings = LOOP_DEFAULTS) -> Hyperparameters:
    """The loop's part of a task's settings. Raises UnknownName, UsageError."""
    merged = resolve_settings(settings, defaults)
    needs_rounds = at_least(merged["lr_schedule"] != "constant")
    check_values(merged, {**_VALID, "lr_rounds": needs_rounds}, defaults)
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
