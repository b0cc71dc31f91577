"""A trainer in the sandbox for a command: `predict`, `serve`, `export` or `task check`."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from agent.cli.models import LocalModel
from agent.home import settings
from agent.home.settings_schema import AgentSettings
from agent.inference import predictions
from agent.tasks.work import Done, Predict, Work
from agent.trainer import sandbox_rules
from agent.trainer.ipc import Progress
from agent.trainer.process import TrainerProcess, ignore, trainer_program
from protocols.errors import DataError, TrainerFailed, UnknownName, UsageError

#: Of a task's own words that a command prints.
_MAX_LINES = 20
_ERRORS = {kind.code: kind for kind in (UsageError, UnknownName, DataError)}


class LocalTrainer:
    """Runs a task in a process that reads only `read` and what every trainer may.

    `folder` is a private one of the command; what the trainer writes is in `work`, a folder in it.
    """

    def __init__(
        self,
        chosen: AgentSettings,
        folder: Path,
        read: Collection[Path],
        on_progress: Callable[[Progress], None] = ignore,
    ) -> None:
        self.work = folder / "work"
        self.work.mkdir(mode=0o700)
        rules = sandbox_rules.make_rules(
            chosen, read=read, write=(self.work,), spool=folder / "spool"
        )
        self.process = TrainerProcess(
            trainer_program(self.work, threads=chosen.threads, rules=rules),
            settings.data_settings(chosen, self.work),
            on_progress=on_progress,
            sources=chosen.task_files,
        )

    def __enter__(self) -> LocalTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    def run(self, work: Work) -> Done:
        """Do the work. Raises CommonweightError without the trainer's log, which is deleted."""
        try:
            return self.process.run(work)
        except TrainerFailed as err:
            hint = without_log(err.hint)
            kind = _ERRORS.get(err.kind)
            if kind is not None:
                raise kind(err.message, hint) from err
            raise TrainerFailed(err.kind, err.message, hint) from err

    def said(self) -> list[str]:
        """The first lines that the task wrote to stderr, such as files that cannot be read;
        without warnings of Python. Ends the trainer, so that its log is complete."""
        self.process.stop()
        log = self.work / "trainer.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return [line for line in lines if "Warning: " not in line and not line.startswith("  ")][
            :_MAX_LINES
        ]

    def load(self, model: LocalModel) -> None:
        """Load the task with its data, and the model. Raises CommonweightError."""
        self.run(_predict(model, [], self.work / "none.jsonl"))

    def predict(self, model: LocalModel, source: str) -> Iterator[dict[str, list[Any]]]:
        """Predictions for a source, in batches of columns. Raises CommonweightError."""
        out = self.work / "answers.jsonl"
        self.run(_predict(model, [source], out))
        return predictions.read(out)


def _predict(model: LocalModel, sources: list[str], out: Path) -> Predict:
    return Predict(
        task=model.task,
        settings=model.settings,
        base=str(model.path),
        sources=sources,
        out=str(out),
    )


def without_log(hint: str) -> str:
    """Drop the hint that names the trainer's log, which is deleted."""
    return "" if hint.startswith("the trainer's log") else hint


def paths_of(source: str) -> list[Path]:
    """The files that a source names; none if it is a text."""
    return [Path(source)] if os.path.exists(source) else [Path(path) for path in glob.glob(source)]
