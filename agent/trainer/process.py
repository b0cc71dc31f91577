"""The trainer as the agent asks it: describe, init, train, evaluate, predict.

Never imports torch. The child behind it is `trainer_life`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from agent.data.settings import DataSettings
from agent.home.run_state import Kept
from agent.tasks import Settings
from agent.trainer.ipc import Describe, Done, Evaluate, Init, Predict, Progress, Train
from agent.trainer.supervisor import TrainerLife
from protocols.errors import TrainerFailed


def ignore(_: Progress) -> None:
    """Nobody wants to know."""


class TrainerProcess(TrainerLife):
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
        journal_every_s: float = 30.0,
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
        self._journal, self._journal_every_s = work_dir / "journal", journal_every_s

    def describe(self, task: str, settings: Settings) -> bytes:
        """What the task says of data and model, encoded. Raises TrainerFailed."""
        work = Describe(id=0, task=task, settings=dict(settings), data=self._data())
        return self.do(work).description

    def init(self, task: str, settings: Settings, seed: int, out: Path) -> Done:
        """Write the task's first weights to `out`. Raises TrainerFailed."""
        work = Init(
            id=0, task=task, settings=dict(settings), data=self._data(), seed=seed, out=_full(out)
        )
        return self.do(work, out)

    def train(
        self, task: str, settings: Settings, base: Path, out: Path, kept: Kept | None = None
    ) -> Done:
        """Train the weights in `base` and write them to `out`. Raises TrainerFailed.

        `settings` are the task's own, and the run's "seed" and the "round" that order the data.
        `base` is never written to again: a version's file, named by its digest.
        """
        try:
            key = _told(base)
            if kept is not None and kept.file.exists():
                key += f" {_told(kept.file)}"
        except OSError as err:
            raise TrainerFailed("file", f"a file cannot be used: {err}") from err
        work = Train(
            id=0,
            task=task,
            settings=dict(settings),
            data=self._data(),
            base=_full(base),
            out=_full(out),
            # Whichever run asks: alike in all this, task, settings and data gives the same result.
            key=key,
            journal=_full(self._journal),
            journal_every_s=self._journal_every_s,
            kept=_full(kept.file) if kept else "",
            kept_out=_full(kept.next) if kept else "",
        )
        return self.do(work, out)

    def evaluate(self, task: str, settings: Settings, base: Path, kept: Kept | None = None) -> Done:
        """Measure the weights in `base` on the held-out data. Raises TrainerFailed."""
        work = Evaluate(
            id=0,
            task=task,
            settings=dict(settings),
            data=self._data(),
            base=_full(base),
            kept=_full(kept.file) if kept else "",
        )
        return self.do(work)

    def predict(
        self,
        task: str,
        settings: Settings,
        base: Path,
        sources: Sequence[Path],
        rows: Sequence[int],
        out: Path,
    ) -> Done:
        """Answer for files with the weights in `base`; answers go to `out`. Raises TrainerFailed.

        `rows` are how many each file must have; none: any.
        """
        work = Predict(
            id=0,
            task=task,
            settings=dict(settings),
            data=self._data(),
            base=_full(base),
            sources=[_full(source) for source in sources],
            rows=list(rows),
            out=_full(out),
        )
        return self.do(work, out)

    def forget(self) -> None:
        """Drop the journal: the last work is done and its answer is safe."""
        self._journal.unlink(missing_ok=True)

    def _data(self) -> DataSettings:
        if self.data.cache:
            return self.data
        return msgspec.structs.replace(self.data, cache=_full(self._work_dir))


def _told(file: Path) -> str:
    """What is another for another file, or for the same one written anew. Raises OSError."""
    found = file.stat()
    return f"{file.name} {found.st_size} {found.st_mtime_ns}"


def _full(path: Path) -> str:
    return str(path.absolute())  # the child works in another folder
