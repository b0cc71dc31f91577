"""The trainer's work without a process of its own, for an agent that lives in a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.home.run_state import Kept
from agent.tasks import Settings
from agent.trainer.executor import Trainer
from agent.trainer.ipc import Describe, Done, Evaluate, Failed, Init, Predict, Train, Work
from agent.trainer.main_loop import answer_to
from agent.trainer.progress import Control
from protocols.errors import TrainerFailed


class InProcess:
    """What `TrainerProcess` does, over `data`, in the caller's thread.

    `source` is the file and class of the task ("/path/file.py:Class"); empty: an installed one.
    """

    def __init__(self, data: DataSettings, threads: int = 1, source: str = "") -> None:
        self._data, self._source = data, source
        self._control = Control()
        self._trainer = Trainer(self._control, lambda progress: None, threads)

    def _done(self, work: Work) -> Done:
        answer = answer_to(replace(work, source=self._source), self._trainer, self._control)
        if isinstance(answer, Failed):
            raise TrainerFailed(answer.kind, answer.message, answer.hint)
        return answer

    def describe(self, task: str, settings: Settings) -> bytes:
        work = Describe(id=1, task=task, settings=dict(settings), data=self._data)
        return self._done(work).description

    def init(self, task: str, settings: Settings, seed: int, out: Path) -> Done:
        return self._done(
            Init(
                id=1,
                task=task,
                settings=dict(settings),
                data=self._data,
                seed=seed,
                out=str(out),
            )
        )

    def train(
        self, task: str, settings: Settings, base: Path, out: Path, kept: Kept | None = None
    ) -> Done:
        return self._done(
            Train(
                id=1,
                task=task,
                settings=dict(settings),
                data=self._data,
                base=str(base),
                out=str(out),
                kept=str(kept.file) if kept else "",
                kept_out=str(kept.next) if kept else "",
            )
        )

    def evaluate(self, task: str, settings: Settings, base: Path, kept: Kept | None = None) -> Done:
        return self._done(
            Evaluate(
                id=1,
                task=task,
                settings=dict(settings),
                data=self._data,
                base=str(base),
                kept=str(kept.file) if kept else "",
            )
        )

    def predict(
        self,
        task: str,
        settings: Settings,
        base: Path,
        sources: Sequence[Path],
        rows: Sequence[int],
        out: Path,
    ) -> Done:
        return self._done(
            Predict(
                id=1,
                task=task,
                settings=dict(settings),
                data=self._data,
                base=str(base),
                sources=[str(source) for source in sources],
                rows=list(rows),
                out=str(out),
            )
        )
