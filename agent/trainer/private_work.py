"""Prepares a task for training with noise for single rows (DP-SGD), or without."""

from __future__ import annotations

import sys

from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks import Task
from agent.tasks.capabilities import TrainsPrivately
from agent.tasks.work import Train, Work
from protocols.errors import UsageError
from protocols.model.personalization import SCAFFOLD
from protocols.privacy import private_training


def data_of(work: Work) -> DataSettings:
    """The data settings for this work, which say whether it adds noise within a budget."""
    is_private = isinstance(work, Train) and private_training.read(work.settings) is not None
    return replace(work.data, adds_noise=True) if is_private and work.data.has_budget else work.data


def protect(work: Train, task: Task) -> TrainsPrivately | None:
    """Make the next training add noise if the work asks for it; returns the task if it will.

    Raises UsageError unless our code trains the task and can do so.
    """
    private = private_training.read(work.settings)
    if private is None:
        if isinstance(task, TrainsPrivately):
            task.protect(None)
        return None
    ours = not work.source and work.task in private_training.TASKS
    if not (ours or _is_trained_by_us(task)):
        raise UsageError(
            f"the task {work.task} cannot train with noise for single rows",
            f"tasks that can: {', '.join(private_training.TASKS)}, and a cw.TorchTask that "
            "replaces no method but those of docs/tasks.md",
        )
    if work.settings.get(SCAFFOLD):
        raise UsageError("--dp cannot be used with control variates", "--strategy fedavg")
    if not isinstance(task, TrainsPrivately):
        raise UsageError(
            f"the task {work.task} trains with noise in PyTorch only, and this machine uses Keras",
            "on that machine: commonweight-agent policy set framework torch",
        )
    task.protect(private)
    return task


def _is_trained_by_us(task: Task) -> bool:
    """True for a module and a data set of a user's own that `TorchTask` trains."""
    if "agent.tasks.training.module_task" not in sys.modules:  # torch may not be installed
        return False
    from agent.tasks.training import trusted_training

    return trusted_training.is_trained_by_us(task)
