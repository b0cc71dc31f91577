"""Trainers without a child process, for agents in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks.work import Describe, Done, Evaluate, Init, Predict, Train, Work
from agent.trainer.executor import WorkExecutor
from agent.trainer.ipc import Failed
from agent.trainer.main_loop import execute
from agent.trainer.progress import WorkControl
from protocols.errors import TrainerFailed


class InProcess:
    """A `TrainerProcess` over `data` that runs in the caller's thread.

    `source` is the file and class of the task ("/path/file.py:Class"); empty: an installed one.
    """

    def __init__(self, data: DataSettings, threads: int = 1, source: str = "") -> None:
        self._data, self._source = data, source
        self._control = WorkControl()
        self._trainer = WorkExecutor(self._control, lambda progress: None, threads)

    def run(self, work: Work) -> Done:
        work = replace(work, id=1, data=self._data, source=self._source)
        answer = execute(work, self._trainer, self._control)
        if isinstance(answer, Failed):
            raise TrainerFailed(answer.kind, answer.message, answer.hint)
        return answer


class ByKind:
    """A trainer of a test: `run` calls the method for the kind of work."""

    describe: Any
    init: Any
    train: Any
    evaluate: Any
    predict: Any

    def run(self, work: Work) -> Done:
        task, settings = work.task, work.settings
        match work:
            case Describe():
                return Done(description=self.describe(task, settings))
            case Init(seed=seed, out=out):
                done = self.init(task, settings, seed, Path(out))
            case Train(base=base, out=out):
                done = self.train(task, settings, Path(base), Path(out))
            case Evaluate(base=base):
                done = self.evaluate(task, settings, Path(base))
            case Predict(base=base, sources=sources, out=out):
                done = self.predict(task, settings, Path(base), sources, Path(out))
        assert isinstance(done, Done)
        return done
