"""After a run has ended: compares its model with one of this machine's rows alone, for the owner.

The work thread calls `advance` while it has nothing else to do. Each call does a few seconds of the
work, so that the work of a new run waits no longer. All state is on disk, so that a restart loses
the last slice alone.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from agent.clientapp import secure_rules
from agent.home import own_results
from agent.home.logs import owner_log
from agent.home.own_results import OwnResult, OwnRun
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Measure, Trainer
from protocols.errors import DiskFull, TrainerFailed, UnknownName
from protocols.local.atomic_files import write_private
from protocols.local.disk_space import check_room
from protocols.local.flower_apps import PREFIX
from protocols.messages import comparisons
from protocols.messages.comparisons import Comparison
from protocols.messages.work import NamedModel, Which, Work
from protocols.privacy import private_training

log = logging.getLogger("commonweight.agent")

#: The coordinator is asked whether a run has ended so long after its last work here, then less and
#: less often.
_FIRST_WAIT_S, _MAX_WAIT_S = 2.0, 600.0
#: Local rounds, whatever the coordinator says of the run.
_MAX_ROUNDS = 1000
_SHARED = "shared.safetensors"
_SPARE_BYTES = 4 * 1024 * 1024
#: Failures that say nothing about the comparison: it goes on later.
_PASSING = frozenset({"stopped", "cancelled", DiskFull.code})


class Link(Protocol):
    """What is asked of the coordinator. All raise Unreachable, Refused."""

    def named_model(self, name: str, which: Which) -> NamedModel: ...

    def download(self, digest: str, nbytes: int, target: Path) -> None: ...


class _Pending(Struct):
    """A run to compare. `due`: when to look again, monotonic s. `model`: its best version, once it
    has ended."""

    run: OwnRun
    due: float
    wait_s: float = _FIRST_WAIT_S
    model: NamedModel | None = None


class OwnComparisons:
    """The comparisons in the home of one agent. Call all methods in the work thread.

    `on_work` hears when work begins and ends (None), as it does of runs.
    """

    def __init__(
        self,
        home: Path,
        trainer: Trainer,
        settings: Callable[[], AgentSettings],
        link: Callable[[], Link],
        on_work: Callable[[Work | None], None],
    ) -> None:
        self._home, self._trainer, self._settings = home, trainer, settings
        self._link, self._on_work = link, on_work
        self._pending: dict[str, _Pending] = {}
        for folder in reversed(own_results.folders(home)):
            found = own_results.read_run(folder)
            if found is not None and own_results.read_result(folder) is None:
                self._pending[found.run] = _Pending(found, time.monotonic() + _FIRST_WAIT_S)

    def note(self, work: Work) -> None:
        """A run has this machine train."""
        chosen = self._settings()
        if chosen.compare == "off" or chosen.fleet or work.task.startswith(PREFIX):
            return
        known = self._pending.get(work.run)
        hides = secure_rules.is_secure(work) or private_training.read(work.settings) is not None
        due = time.monotonic() + _FIRST_WAIT_S
        is_local = hides or (known is not None and known.run.is_local)
        settings = {**work.settings, "seed": work.seed}
        run = OwnRun(run=work.run, task=work.task, settings=settings, is_local=is_local)
        if known is None or known.run != run:
            self._write_run(run)
        self._pending[work.run] = _Pending(run, due)

    def _write_run(self, run: OwnRun) -> None:
        """Remember a run. What an earlier comparison of it left is of an older version."""
        folder = own_results.folder_of(self._home, run.run)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        write_private(own_results.run_file(folder), msgspec.json.encode(run), synced=False)
        for old in own_results.folders(self._home)[own_results.MAX_RUNS :]:
            shutil.rmtree(old, ignore_errors=True)
            self._pending = {n: p for n, p in self._pending.items() if self._folder(p) != old}

    def _folder(self, of: _Pending) -> Path:
        return own_results.folder_of(self._home, of.run.run)

    @property
    def due_s(self) -> float:
        """Seconds until there is something to do; infinite without a run to compare."""
        now = time.monotonic()
        return min(
            (max(0.0, one.due - now) for one in self._pending.values()), default=float("inf")
        )

    def advance(self) -> bool:
        """Do a part of what is due. True if more is to do at once.

        Raises Unreachable, SessionLost.
        """
        chosen = self._settings()
        if chosen.compare == "off":
            self._pending.clear()
        due = [one for one in self._pending.values() if one.due <= time.monotonic()]
        if not due:
            return False
        one = due[0]
        if one.model is None and not self._has_ended(one):
            one.due, one.wait_s = time.monotonic() + one.wait_s, min(2 * one.wait_s, _MAX_WAIT_S)
            return False
        assert one.model is not None
        if not chosen.allows(one.run.task):
            self._finish(one, None, "the owner does not allow the task any more")
            return False
        try:
            found = self._measure(one, one.model)
        except TrainerFailed as err:
            if err.kind not in _PASSING:
                self._finish(one, None, err.message)
            one.due = time.monotonic() + _MAX_WAIT_S
            return False
        except DiskFull:
            one.due = time.monotonic() + _MAX_WAIT_S
            return False
        if found is not None:
            self._finish(one, found)
        return True

    def _has_ended(self, one: _Pending) -> bool:
        try:
            model = self._link().named_model(one.run.run, "best")
        except UnknownName:  # no version yet, or none that is a whole model
            return False
        if not model.ended_rounds or model.run != one.run.run:
            return False
        one.model = model
        return True

    def _measure(self, one: _Pending, model: NamedModel) -> Comparison | None:
        """A slice of the comparison; the result if it was the last one."""
        folder, shared = self._folder(one), self._folder(one) / _SHARED
        if not shared.exists():
            check_room(folder, 4 * model.nbytes + _SPARE_BYTES)
            self._link().download(model.digest, model.nbytes, shared)
        work = Measure(
            run=one.run.run,
            task=one.run.task,
            settings=dict(one.run.settings),
            base=str(shared),
            folder=str(folder),
            rounds=min(model.ended_rounds, _MAX_ROUNDS),
        )
        self._on_work(Work(run=one.run.run, round=model.round, kind="evaluate", task=one.run.task))
        try:
            done = self._trainer.run(work)
        finally:
            self._on_work(None)
        if not done.description:
            return None
        return msgspec.json.decode(done.description, type=Comparison)

    def _finish(self, one: _Pending, found: Comparison | None, why: str = "") -> None:
        model, folder = one.model, self._folder(one)
        result = OwnResult(
            run=one.run.run,
            task=one.run.task,
            at=time.time(),
            round=model.round if model else 0,
            digest=model.digest if model else "",
            comparison=found,
            why=why,
        )
        write_private(own_results.result_file(folder), msgspec.json.encode(result))
        (folder / _SHARED).unlink(missing_ok=True)
        self._pending.pop(one.run.run)
        if found is not None:
            log.info("run %s: compared on %d held-out rows", result.run, found.rows)
            for line in comparisons.lines_of(found):
                owner_log.info("%s", line)
        else:
            owner_log.info("run %s: no comparison: %s", result.run, why)
