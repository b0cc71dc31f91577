"""Which tasks of users train with noise for single examples: those that our loop trains."""

from __future__ import annotations

from agent.tasks.training.module_task import TorchTask
from agent.tasks.training.torch_loop import TrainingLoop
from agent.tasks.training.torch_task import LoopTask

#: What a task may replace.
_OF_USERS = {"version", "Settings", "defaults", "model", "data", "loss", "metrics", "optimizer"}
_OF_USERS |= {"inputs", "answers", "example", "_known"}


def is_trained_by_us(task: object) -> bool:
    """True for a `TorchTask` that replaces nothing but the methods for users, so that our code
    clips gradients, adds noise and says what that costs.

    This is no security boundary: a task is code in the process that adds the noise. Its owner has
    allowed it.
    """
    if not isinstance(task, TorchTask):
        return False
    kinds = type(task).__mro__
    theirs = {name for kind in kinds[: kinds.index(TorchTask)] for name in vars(kind)}
    ours = {name for kind in (TorchTask, LoopTask) for name in vars(kind)} - _OF_USERS
    shadowed = ours & (theirs | vars(task).keys())
    return (
        all(name.startswith("__") for name in shadowed)
        and type(task._local) is TrainingLoop
        and (task.protect, task.spent) == (task._protect, task._local.spent)
    )
