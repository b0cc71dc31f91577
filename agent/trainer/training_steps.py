"""What happens after each step of training: reports, the owner's floors, and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.tasks import OnStep, Snapshot, Task, floors
from agent.tasks.capabilities import Resumable
from agent.tasks.floors import StepFloors
from agent.tasks.training import rng_state
from agent.tasks.work import Train
from agent.trainer.checkpoint import CheckpointFile
from agent.trainer.progress import StepCallback
from protocols import VERSION

#: In a checkpoint: the examples of its steps so far.
_EXAMPLES_DONE = "examples done"


def metered(
    work: Train,
    task: Task,
    report: Callable[..., StepCallback],
    on_resume: Callable[[CheckpointFile], None],
) -> tuple[OnStep, int]:
    """The `on_step` of training, and the step at which training resumes.

    `report` makes the callback that reports steps; `on_resume` gets the checkpoint before the task
    restores it.
    """
    if not (work.checkpoint and isinstance(task, Resumable)):
        return _with_floors(work, report()), 0
    checkpoint = CheckpointFile(
        Path(work.checkpoint), _checkpoint_key(work), work.checkpoint_every_s
    )
    resumed_at = seen = 0
    kept = checkpoint.load()
    if kept is not None:
        on_resume(checkpoint)
        resumed_at, snapshot, rng_arrays = kept
        seen = int(snapshot.values.get(_EXAMPLES_DONE, 0))
        task.restore(snapshot)
        rng_state.restore(rng_arrays)

    def keep(step: int) -> None:
        arrays, values = task.snapshot()
        done = on_step.seen if isinstance(on_step, StepFloors) else 0
        checkpoint.save(step, Snapshot(arrays, {**values, _EXAMPLES_DONE: done}))

    reported = report(is_due=lambda: checkpoint.is_due, keep=keep, resumed=kept is not None)
    on_step = _with_floors(work, reported, seen)
    return on_step, resumed_at


def _with_floors(work: Train, report: OnStep, seen: int = 0) -> OnStep:
    """The `on_step` with the owner's floors; `seen` examples were done before it is called."""
    return StepFloors(report, work.data.floors, seen) if floors.reads_data(work) else report


def _checkpoint_key(work: Train) -> str:
    """A hash of all that must be equal for training to resume from a checkpoint."""
    settings = sorted(work.settings.items())
    same = [VERSION, work.key, work.task, settings, msgspec.to_builtins(work.data)]
    return hashlib.sha256(msgspec.json.encode(same)).hexdigest()
