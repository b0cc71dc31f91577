"""A trainer without a child process, for simulated peers and tests."""

from __future__ import annotations

from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks.work import Done, Work
from agent.trainer.executor import WorkExecutor
from agent.trainer.ipc import Failed
from agent.trainer.main_loop import execute
from agent.trainer.progress import WorkControl
from protocols.errors import TrainerFailed


class InProcessTrainer:
    """A `TrainerProcess` over `data` that runs in the caller's thread, without a sandbox.

    `source` is the file and class of the task ("/path/file.py:Class"); empty: an installed one.
    """

    trains_ahead = False

    def __init__(self, data: DataSettings, threads: int = 1, source: str = "") -> None:
        self._data, self._source = data, source
        self._control = WorkControl()
        self._trainer = WorkExecutor(self._control, lambda progress: None, threads)

    def run(self, work: Work) -> Done:
        """Do the work on `data` and return its result. Raises TrainerFailed."""
        work = replace(work, id=1, data=self._data, source=self._source)
        answer = execute(work, self._trainer, self._control)
        if isinstance(answer, Failed):
            raise TrainerFailed(answer.kind, answer.message, answer.hint)
        return answer

    def cancel_training(self) -> None:
        """Nothing: the caller's thread trains, and nothing trains in the background."""
