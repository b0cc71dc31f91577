"""The settings of local training, with their bounds. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from agent.tasks import Setting, Settings, merge_settings
from agent.tasks.training.setting_hints import specs_of
from protocols.errors import UnknownName, UsageError

#: The valid values of a setting: a test, or the choices.
Valid = Callable[[Any], bool] | tuple[str, ...]


def at_least(minimum: float) -> Callable[[float], bool]:
    return lambda value: value >= minimum


def fraction(value: float) -> bool:
    return 0 <= value < 1


def anything(value: object) -> bool:
    return True


#: The default of a setting and its valid values.
Option = tuple[Setting, Valid]


@dataclass
class LoopSettings:
    """The settings of the training loop. Tasks override defaults."""

    epochs: Annotated[int, Meta(ge=1, description="passes over this peer's examples")] = 5
    batch_size: Annotated[
        int, Meta(ge=0, description="examples in a step; 0 or all: all of them")
    ] = 10
    max_steps: Annotated[int, Meta(ge=0, description="stop after these steps; 0: no limit")] = 0
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Meta(ge=0, description="learning rate")] = 0.1
    lr_schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Meta(description="the learning rate over rounds; not constant: to 0 over lr_rounds"),
    ] = "constant"
    lr_rounds: Annotated[int, Meta(ge=0, description="the rounds of lr_schedule")] = 0
    lr_decay: Annotated[
        float, Meta(gt=0, le=1, description="factor of the learning rate from round to round")
    ] = 1.0
    warmup_rounds: Annotated[
        int, Meta(ge=0, description="rounds until the full learning rate is reached")
    ] = 0
    momentum: Annotated[float, Meta(ge=0, lt=1, description="of sgd")] = 0.0
    weight_decay: Annotated[
        float,
        Meta(ge=0, description="sgd: added to the gradient, times the weights; adamw: decoupled"),
    ] = 0.0
    clip_norm: Annotated[
        float, Meta(ge=0, description="the largest norm of a step's gradient; 0: no limit")
    ] = 0.0
    proximal_mu: Annotated[
        float, Meta(ge=0, description="strength of the pull to the first weights (FedProx)")
    ] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        Meta(description="auto: bf16 on a graphics card, or fp16 without bf16; else fp32"),
    ] = "auto"


LOOP = specs_of(LoopSettings)
LOOP_DEFAULTS: Mapping[str, Setting] = {name: spec.default for name, spec in LOOP.items()}
_VALID: Mapping[str, Valid] = {name: spec.choices or spec.allows for name, spec in LOOP.items()}


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
