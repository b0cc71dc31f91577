"""The trainer as the agent asks it: one work at a time, completed with this machine's data.

Never imports torch. The child behind it is `trainer_life`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from agent.data.settings import DataSettings
from agent.tasks.work import Done, Predict, Train, Work
from agent.trainer.ipc import Progress
from agent.trainer.supervisor import TrainerSupervisor
from protocols.errors import TrainerFailed


def ignore(_: Progress) -> None:
    """Nobody wants to know."""


class TrainerProcess(TrainerSupervisor):
    """A trainer that is started when first needed, and again after it died or was stopped.

    `data` is what the next work trains on. `threads` = 0 takes half the cores. A work that shows
    no sign of life for `hang_s` while not paused is ended ("hung"), and one that does not obey a
    cancel within `grace_s` too. `on_progress` runs in the reader's thread and must not block.

    Training is kept in a journal at most every `journal_every_s`; after a kill of the child or of
    this process the same work, asked again, goes on from there.

    `sources` are the tasks that the owner has registered: "/path/file.py:Class" by name.
    """

    def __init__(
        self,
        work_dir: Path,
        data: DataSettings,
        *,
        threads: int = 0,
        nice: int = 0,
        fleet: str = "",
        on_progress: Callable[[Progress], None] = ignore,
        hang_s: float = 600.0,
        grace_s: float = 10.0,
        checkpoint_every_s: float = 30.0,
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        threads = threads or max(1, (os.cpu_count() or 2) // 2)
        options = ["--threads", str(threads), "--nice", str(nice)]
        super().__init__(
            work_dir,
            program=["agent.trainer.subfleet", fleet] if fleet else ["agent.trainer", *options],
            threads=threads,
            on_progress=on_progress,
            hang_s=hang_s,
            grace_s=grace_s,
            sources=sources,
        )
        self.data = data
        self._checkpoint, self._checkpoint_every_s = work_dir / "journal", checkpoint_every_s

    def run(self, work: Work) -> Done:
        """Do a work on this machine's data, and wait for its end. Raises TrainerFailed."""
        return self.do(self._with_local_data(work))

    def _with_local_data(self, work: Work) -> Work:
        """The work with this machine's data and journal. Paths become absolute: the child works in
        another folder."""
        added: dict[str, Any] = {"data": self._data()}
        for name in ("base", "out", "personal", "personal_out"):
            if path := getattr(work, name, ""):
                added[name] = _absolute(path)
        if isinstance(work, Predict):
            added["sources"] = [_absolute(source) for source in work.sources]
        if isinstance(work, Train):
            # Whichever run asks: alike in all this, task, settings and data gives the same result.
            files = [work.base, *([work.personal] if Path(work.personal).is_file() else [])]
            try:
                added["key"] = " ".join(_file_stamp(Path(file)) for file in files)
            except OSError as err:
                raise TrainerFailed("file", f"a file cannot be used: {err}") from err
            added["checkpoint"] = _absolute(self._checkpoint)
            added["checkpoint_every_s"] = self._checkpoint_every_s
        return msgspec.structs.replace(work, **added)

    def delete_checkpoint(self) -> None:
        """Drop the journal: the last work is done and its answer is safe."""
        self._checkpoint.unlink(missing_ok=True)

    def _data(self) -> DataSettings:
        if self.data.cache:
            return self.data
        return msgspec.structs.replace(self.data, cache=_absolute(self._work_dir))


def _file_stamp(file: Path) -> str:
    """What is another for another file, or for the same one written anew. Raises OSError."""
    found = file.stat()
    return f"{file.name} {found.st_size} {found.st_mtime_ns}"


def _absolute(path: str | Path) -> str:
    return str(Path(path).absolute())
