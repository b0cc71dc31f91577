"""The trainer as the agent uses it: adds this machine's data to each piece of work.

Never imports torch. `supervisor` runs the child process.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from agent.data.settings import DataSettings
from agent.policy.file_access import SandboxRules
from agent.tasks.work import Done, Predict, Train, Work
from agent.trainer.child_process import Program, half_of_cores
from agent.trainer.ipc import Progress
from agent.trainer.supervisor import GRACE_S, TrainerSupervisor
from protocols.errors import TrainerFailed


class Terms(NamedTuple):
    """The terms of an owner for a task: patterns of columns, and its code (see `task_code.digest`).

    `has_budget`: as in `DataSettings`.
    """

    columns: tuple[str, ...]
    code: str = ""
    has_budget: bool = False


def ignore(_: Progress) -> None:
    """Discard a progress report."""


def trainer_program(
    work_dir: Path, *, threads: int = 0, nice: int = 0, rules: SandboxRules | None = None
) -> Program:
    """The program that runs tasks, in the folder `work_dir`.

    `threads` = 0 uses half of the cores. `rules` are those of the sandbox; None: there is none.
    """
    threads = threads or half_of_cores()
    arguments = ["agent.trainer", "--threads", str(threads), "--nice", str(nice)]
    return Program(work_dir, arguments, threads, rules)


def subfleet_program(work_dir: Path, fleet: str) -> Program:
    """The program that passes the work on to the coordinator whose home is `fleet`.

    No task runs in it, and so there is no sandbox.
    """
    return Program(work_dir, ["agent.trainer.subfleet", fleet], half_of_cores())


class TrainerProcess(TrainerSupervisor):
    """A trainer process that is started when needed, also after it died or was stopped.

    `program`: see `trainer_program` and `subfleet_program`. `data` is what the next work trains on.
    The process is killed if it sends nothing for `hang_s` while not paused ("hung"), or does not
    obey a cancel within `grace_s`. `on_progress` runs in the reader thread and must not block.

    A checkpoint is written at most every `checkpoint_every_s`. After a kill of the child or of this
    process, the same work resumes from it.

    `sources` are the tasks that the owner has registered: "/path/file.py:Class" by name.
    `terms(task)` returns the owner's terms for a task now; without it, `data` has them.
    """

    def __init__(
        self,
        program: Program,
        data: DataSettings,
        *,
        on_progress: Callable[[Progress], None] = ignore,
        hang_s: float = 600.0,
        grace_s: float = GRACE_S,
        checkpoint_every_s: float = 30.0,
        sources: Mapping[str, str] = MappingProxyType({}),
        terms: Callable[[str], Terms] | None = None,
    ) -> None:
        super().__init__(program, on_progress=on_progress, hang_s=hang_s, grace_s=grace_s)
        self.data, self._sources, self._terms = data, sources, terms
        self._checkpoint = program.work_dir / "journal"
        self._checkpoint_every_s = checkpoint_every_s

    def run(self, work: Work) -> Done:
        """Do the work on this machine's data and return its result. Raises TrainerFailed."""
        return self.do(self._with_local_data(work))

    def _with_local_data(self, work: Work) -> Work:
        """The work with this machine's data and checkpoint, and the file of its task. Paths become
        absolute, because the child runs in another folder."""
        source = self._sources.get(work.task, "")
        added: dict[str, Any] = {"data": self._data(), "source": source}
        if self._terms is not None:
            terms = self._terms(work.task)
            added["data"] = msgspec.structs.replace(
                added["data"], columns=terms.columns, has_budget=terms.has_budget
            )
            added["code"] = terms.code
        for name in ("base", "out", "personal", "personal_out", "folder"):
            if path := getattr(work, name, ""):
                added[name] = _absolute(path)
        if isinstance(work, Predict):
            added["sources"] = [_located(source) for source in work.sources]
        if isinstance(work, Train):
            # Equal files, task, settings and data give the same result, whatever the run.
            files = [work.base, *([work.personal] if os.path.isfile(work.personal) else [])]
            try:
                added["key"] = " ".join(map(_file_stamp, files))
            except OSError as err:
                raise TrainerFailed("file", f"a file cannot be used: {err}") from err
            added["checkpoint"] = _absolute(self._checkpoint)
            added["checkpoint_every_s"] = self._checkpoint_every_s
        return msgspec.structs.replace(work, **added)

    def delete_checkpoint(self) -> None:
        """Delete the checkpoint: the result of the last work is stored safely."""
        self._checkpoint.unlink(missing_ok=True)

    def _data(self) -> DataSettings:
        if self.data.cache:
            return self.data
        return msgspec.structs.replace(self.data, cache=_absolute(self._program.work_dir))


def _file_stamp(file: str) -> str:
    """A text that changes when the file does. Raises OSError."""
    found = os.stat(file)
    return f"{os.path.basename(file)} {found.st_size} {found.st_mtime_ns}"


def _located(source: str) -> str:
    """A path or pattern of files as an absolute one; a text as it is."""
    return _absolute(source) if os.path.exists(source) or glob.glob(source) else source


def _absolute(path: str | Path) -> str:
    return os.fspath(path) if os.path.isabs(path) else str(Path(path).absolute())
