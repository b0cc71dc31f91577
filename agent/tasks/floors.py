"""The owner's floors: what no setting of a run can go below. Pure.

The settings of a run come from the coordinator. With one row a step and one step, an update is the
gradient of that row, and the row follows from it exactly (Zhu et al. 2019, arXiv 1906.08935).
Floors refuse such settings. They do not stop a coordinator that combines a crafted model with large
batches (Fowl et al. 2022, arXiv 2110.13057): only noise does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import SupportsFloat

from agent.data.settings import Floors
from agent.tasks import OnStep, Setting, Settings
from agent.tasks.work import Work
from protocols.errors import NotAllowed

#: Built-in tasks that read no data of the owner.
WITHOUT_DATA = frozenset({"ping"})


def reads_data(work: Work) -> bool:
    """False for a built-in task that reads no data of the owner."""
    return bool(work.source) or work.task not in WITHOUT_DATA


_LEARNING_RATES = ("lr", "learning_rate")
#: Settings that pull the weights back in each step, times the learning rate.
_PULLS = ("weight_decay", "proximal_mu")
#: The largest part of earlier steps that a step may take back.
MAX_FORGOTTEN = 0.5
_SET = "on that machine: commonweight-agent policy set"


def check_settings(settings: Settings, defaults: object, floors: Floors) -> None:
    """Raise NotAllowed for settings with which training falls below a floor.

    `defaults` are those of the task, if it has a mapping of them.
    """
    merged = {**(defaults if isinstance(defaults, Mapping) else {}), **settings}
    for name in _LEARNING_RATES:
        lr = _number(merged.get(name))
        if floors.max_lr and lr is not None and not 0 <= lr <= floors.max_lr:
            allow = f", or {_SET} max_lr {lr:g}" if 0 < lr < math.inf else ""
            raise NotAllowed(
                f"the owner's max_lr is {floors.max_lr:g}, and the run asks for {name}={lr:g}",
                f"--set {name}={floors.max_lr:g}{allow}",
            )
    batch, steps = (_number(merged.get(name)) or 0 for name in ("batch_size", "max_steps"))
    if 0 < batch < floors.min_batch:
        raise _small_batch(f"batch_size={batch:g}", batch, floors)
    _check_memory(merged, floors)
    if 0 < batch * steps < floors.min_examples:
        asked = f"max_steps={steps:g} of batch_size={batch:g}, {batch * steps:g} rows"
        raise _few_examples(asked, batch * steps, floors)


def _check_memory(settings: Mapping[str, Setting], floors: Floors) -> None:
    """Raise NotAllowed if training forgets.

    With lr times weight_decay = 1, a step of SGD takes back all earlier ones, so the update is that
    of the last step's rows alone.
    """
    if floors.min_examples <= floors.min_batch:
        return
    lr = max(_number(settings.get(name)) or 0.0 for name in _LEARNING_RATES)
    for name in _PULLS:
        pull = _number(settings.get(name)) or 0.0
        if lr and not lr * pull <= MAX_FORGOTTEN:
            raise NotAllowed(
                f"the owner's min_examples is {floors.min_examples} rows for an update, and with "
                f"{name}={pull:g} each step forgets the rows of earlier ones",
                f"--set {name}={MAX_FORGOTTEN / lr:.2g} or less",
            )


def check_cohort(cohort: int, floors: Floors) -> None:
    """Raise NotAllowed if a round of a run may have too few peers; 0 if it does not say."""
    if cohort < floors.min_cohort > 1:
        asked = f"a round of this run may have {cohort}" if cohort else "this run does not say"
        raise NotAllowed(
            f"the owner's min_cohort is {floors.min_cohort} peers in a round, and {asked}",
            f"--quorum {floors.min_cohort}, or {_SET} min_cohort {max(cohort, 1)}",
        )


def check_examples(task: str, num_examples: int, floors: Floors) -> None:
    """Raise NotAllowed if an update of `task` has seen too few rows."""
    if task not in WITHOUT_DATA and num_examples < floors.min_examples:
        raise _few_examples(f"an update of {num_examples} rows", num_examples, floors)


class StepFloors:
    """An `on_step` that raises NotAllowed when a step had too few rows; else it calls `on_step`.

    `seen`: the examples before the first call, of training that resumes.
    """

    def __init__(self, on_step: OnStep, floors: Floors, seen: int = 0) -> None:
        self._on_step, self._floors, self.seen = on_step, floors, seen
        self._fault: NotAllowed | None = None

    def __call__(self, step: int, steps: int, loss: SupportsFloat, examples_done: int) -> None:
        rows = int(examples_done) - self.seen
        if rows < self._floors.min_batch > 1:
            self._fault = _no_examples(self._floors)
            if rows > 0:
                self._fault = _small_batch(f"a step of {rows}", rows, self._floors)
            raise self._fault
        self.seen = int(examples_done)
        self._on_step(step, steps, loss, examples_done)

    def check_result(self, num_examples: int) -> None:
        """Raise NotAllowed if training on `num_examples` rows saw too few of them.

        Also if a step had too few and the task caught the error.
        """
        if self._fault is not None:
            raise self._fault
        if self._floors.min_examples > 1 and self.seen <= 0:
            raise _no_examples(self._floors)
        if (seen := min(self.seen, num_examples)) < self._floors.min_examples > 1:
            raise _few_examples(f"an update of {seen} rows", seen, self._floors)


def _small_batch(asked: str, rows: float, floors: Floors) -> NotAllowed:
    return NotAllowed(
        f"the owner's min_batch is {floors.min_batch} rows a step, and the run asks for {asked}",
        f"--set batch_size={floors.min_batch}, or {_SET} min_batch {max(1, int(rows))}",
    )


def _few_examples(asked: str, rows: float, floors: Floors) -> NotAllowed:
    return NotAllowed(
        f"the owner's min_examples is {floors.min_examples} rows for an update, and the run makes "
        f"{asked}",
        f"more steps or more data, or {_SET} min_examples {max(1, int(rows))}",
    )


def _no_examples(floors: Floors) -> NotAllowed:
    return NotAllowed(
        f"the owner's min_batch is {floors.min_batch} rows a step, and the task does not count the "
        "rows of its steps",
        f"the last argument of on_step is the rows so far; or {_SET} min_batch 1, min_examples 1",
    )


def _number(value: object) -> float | None:
    """The value of a setting, a number or its text."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
