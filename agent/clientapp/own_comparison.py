"""After a run has ended: compares its model with one of this machine's rows alone, for the owner.

The best version of the run stays in the home, so that this machine predicts with it offline; it may
be older than the newest version, and of another model.

The work thread calls `advance` while it has nothing else to do. Each call does a few seconds of the
work, so that the work of a new run waits no longer. All state is on disk, so that a restart loses
the last slice alone.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent.clientapp import other_models, secure_rules
from agent.clientapp.comparison_sender import ComparisonSender, WasTold
from agent.clientapp.outbox import KEPT, PERSONAL
from agent.home import own_results
from agent.home.logs import owner_log
from agent.home.own_results import OwnResult, OwnRun
from agent.home.run_state import RunStateFolder
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Measure, Trainer
from protocols.errors import DataError, DiskFull, TrainerFailed, UnknownName, UsageError
from protocols.local.atomic_files import write_private
from protocols.local.disk_space import check_room
from protocols.local.flower_apps import PREFIX
from protocols.messages import comparisons
from protocols.messages.comparisons import Comparison, Missing
from protocols.messages.work import NamedModel, Which, Work
from protocols.model.weights import file_digest
from protocols.privacy import private_training
from protocols.tables.model_scores import kind_of

log = logging.getLogger("commonweight.agent")

#: How long after the last work here the coordinator is first asked whether the run has ended. The
#: waits grow.
_FIRST_WAIT_S, _MAX_WAIT_S = 2.0, 600.0
#: How long after work for another run no comparison begins, as that run may soon have more work.
_QUIET_S = 15.0
#: The models are trained for at most as long as the run trained here, or for this long.
_LEAST_S = 10.0
#: Local rounds, whatever the coordinator says of the run.
_MAX_ROUNDS = 1000
_SPARE_BYTES = 4 * 1024 * 1024
#: A best version up to this size stays.
_KEPT_BYTES = 64 * 1024 * 1024
#: After these failures the comparison is tried again later.
_PASSING = frozenset({"stopped", "cancelled", DiskFull.code})
#: The coordinator gets the reason of these failures; of others, only that the comparison failed.
_MISSING: dict[str, Missing] = {UsageError.code: "task", DataError.code: "rows"}


class Link(Protocol):
    """What is asked of the coordinator. All raise Unreachable, Refused."""

    def named_model(self, name: str, which: Which) -> NamedModel: ...

    def download(self, digest: str, nbytes: int, target: Path) -> None: ...

    def send_comparison(self, told: Comparison) -> None: ...


class _Pending(Struct):
    """A run to compare. `due`: when to look again, monotonic s. `model`: its best version, once it
    has ended. `result`: one that the coordinator does not have yet. `unwritten_s`: of the duration
    of its training, what its file lacks. `base`: the version that it trained from last."""

    run: OwnRun
    due: float
    wait_s: float = _FIRST_WAIT_S
    model: NamedModel | None = None
    result: OwnResult | None = None
    unwritten_s: float = 0.0
    base: str = ""


class OwnComparisons:
    """The comparisons in the home of one agent. Call all methods in the work thread.

    `on_comparing(run)` is called when a part of a comparison begins, and with "" when it ends.
    `was_told`: see `ComparisonSender`.
    """

    def __init__(
        self,
        home: Path,
        trainer: Trainer,
        settings: Callable[[], AgentSettings],
        link: Callable[[], Link],
        on_comparing: Callable[[str], None],
        was_told: WasTold,
    ) -> None:
        self._home, self._trainer, self._settings = home, trainer, settings
        self._link, self._on_comparing = link, on_comparing
        self._sender = ComparisonSender(
            home, settings, lambda told: link().send_comparison(told), was_told
        )
        #: The run that this machine worked for last, and when (monotonic s).
        self._last_work = ("", -math.inf)
        self._pending: dict[str, _Pending] = {}
        self._own_layers = RunStateFolder(home / "outbox" / PERSONAL, KEPT)
        for folder in reversed(own_results.folders(home)):
            found, result = own_results.read_run(folder), own_results.read_result(folder)
            if found is not None and result is not None:  # a stop may have come before this
                other_models.drop(home, found)
            if found is not None and (result is None or result.to_tell):
                due = time.monotonic() + _FIRST_WAIT_S
                self._pending[found.run] = _Pending(found, due, result=result)

    def note(self, work: Work) -> None:
        """A run has this machine train. Nothing here may end its work."""
        self._last_work = (work.run, time.monotonic())
        try:
            self._note(work)
        except OSError as err:
            log.warning("no comparison after run %s: %s", work.run, err.strerror)

    def _note(self, work: Work) -> None:
        chosen = self._settings()
        if chosen.fleet or work.task.startswith(PREFIX):
            return
        known = self._pending.get(work.run)
        before = known.run if known is not None else own_results.read_run(self._of(work.run))
        hides = secure_rules.is_secure(work) or work.settings.keys() & private_training.SETTINGS
        due = time.monotonic() + _FIRST_WAIT_S
        # A coordinator could send a plain training of the same run afterwards.
        is_local = bool(hides) or (before is not None and before.is_local)
        settings = {**work.settings, "seed": work.seed}
        trained_s = before.trained_s if before is not None else 0.0
        run = OwnRun(
            run=work.run,
            task=work.task,
            settings=settings,
            is_local=is_local,
            trained_s=trained_s,
            begun=work.begun,
            earlier=other_models.earlier(before, work.begun),
        )
        if known is not None and known.run.begun != run.begun:
            self._keep(known)
        if known is None or known.run != run:
            self._write_run(run)
        unwritten_s = known.unwritten_s if known is not None else 0.0
        self._pending[work.run] = _Pending(run, due, unwritten_s=unwritten_s, base=work.base)

    def _keep(self, one: _Pending) -> None:
        """Keep the version of the present model for a blend, unless the owner wants none."""
        if self._settings().compare != "off":
            other_models.keep(self._home, one.run, one.base)

    def add_time(self, run: str, seconds: float) -> None:
        """Add the duration of a training: the comparison afterwards takes no longer than all."""
        self._last_work = (run, time.monotonic())
        if (one := self._pending.get(run)) is None:
            return
        one.run = replace(one.run, trained_s=one.run.trained_s + seconds)
        one.unwritten_s += seconds
        if one.unwritten_s < _LEAST_S / 10:  # not for each of many short rounds
            return
        try:
            file = own_results.run_file(self._folder(one))
            write_private(file, msgspec.json.encode(one.run), synced=False)
            one.unwritten_s = 0.0
        except OSError as err:
            log.warning("run %s: its time is not noted: %s", run, err.strerror)

    def _write_run(self, run: OwnRun) -> None:
        """Remember a run. What an earlier comparison of it left is of an older version."""
        folder = self._of(run.run)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = {own_results.other_file(folder, one.begun) for one in run.earlier}
        for file in folder.iterdir():
            if file not in kept:
                file.unlink()
        write_private(own_results.run_file(folder), msgspec.json.encode(run), synced=False)
        for old in own_results.folders(self._home)[own_results.MAX_RUNS :]:
            shutil.rmtree(old, ignore_errors=True)
            self._pending = {n: p for n, p in self._pending.items() if self._folder(p) != old}

    def _of(self, run: str) -> Path:
        return own_results.folder_of(self._home, run)

    def _folder(self, of: _Pending) -> Path:
        return self._of(of.run.run)

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
        now, (last, at) = time.monotonic(), self._last_work
        for other in self._pending.values() if now - at < _QUIET_S else ():
            if other.run.run != last and other.result is None:
                other.due = max(other.due, at + _QUIET_S)
        due = [one for one in self._pending.values() if one.due <= now]
        if not due:
            return False
        one = due[0]
        # Before anything that may raise: what fails each time is tried less and less often.
        one.due, one.wait_s = time.monotonic() + one.wait_s, min(2 * one.wait_s, _MAX_WAIT_S)
        try:
            if one.result is not None:
                self._tell(one, one.result)
                return False
            return self._go_on(one, chosen)
        except TrainerFailed as err:
            if err.kind not in _PASSING:
                self._finish(one, None, err.message, _MISSING.get(err.kind, "failed"))
                one.due = time.monotonic()
            elif err.kind == "cancelled":  # for other work, which may not come
                one.due, one.wait_s = time.monotonic() + _FIRST_WAIT_S, _FIRST_WAIT_S
        except (DiskFull, OSError) as err:
            why = err.message if isinstance(err, DiskFull) else err.strerror
            log.warning("the comparison after run %s waits: %s", one.run.run, why)
        return False

    def _go_on(self, one: _Pending, chosen: AgentSettings) -> bool:
        if one.model is None and not self._has_ended(one):
            return False
        assert one.model is not None
        if not chosen.allows(one.run.task):
            self._finish(one, None, "the owner does not allow the task any more")
            return False
        if chosen.compare == "off":
            if one.model.nbytes <= _KEPT_BYTES:
                self._fetch(one, one.model)
            self._finish(one, None, "it is off on this machine")
            return False
        found = self._measure(one, one.model)
        if found is not None:
            self._finish(one, found)
        one.due, one.wait_s = time.monotonic(), _FIRST_WAIT_S
        return True

    def _has_ended(self, one: _Pending) -> bool:
        try:
            model = self._link().named_model(one.run.run, "best")
        except UnknownName:  # no version yet, or none that is a whole model
            return False
        if not model.ended_rounds or model.run != one.run.run:
            return False
        one.model = model
        shared = own_results.model_file(self._folder(one), "shared")
        if shared.exists() and file_digest(shared) != model.digest:
            self._write_run(one.run)  # of an older version, or damaged on this disk
        self._keep(one)
        return True

    def _measure(self, one: _Pending, model: NamedModel) -> Comparison | None:
        """A slice of the comparison; the result if it was the last one."""
        work = Measure(
            run=one.run.run,
            task=one.run.task,
            settings=dict(one.run.settings_of(model.round, _kind(one.run, model))),
            base=str(self._fetch(one, model)),
            folder=str(self._folder(one)),
            rounds=min(model.ended_rounds, _MAX_ROUNDS),
            personal=str(self._own_layers.paths(one.run.run).file),
            mu=model.personal_mu,
            most_s=max(_LEAST_S, one.run.trained_s),
            metric=model.metric,
            lower_is_better=model.lower_is_better,
            others=other_models.of_run(self._home, one.run, model.round),
        )
        self._on_comparing(one.run.run)
        try:
            done = self._trainer.run(work)
        finally:
            self._on_comparing("")
        if not done.description:
            return None
        return msgspec.json.decode(done.description, type=Comparison)

    def _fetch(self, one: _Pending, model: NamedModel) -> Path:
        """The file of the best version, downloaded if it is not here."""
        folder = self._folder(one)
        shared = own_results.model_file(folder, "shared")
        if not shared.exists():
            check_room(folder, 4 * model.nbytes + _SPARE_BYTES)
            self._link().download(model.digest, model.nbytes, shared)
        return shared

    def _finish(
        self, one: _Pending, found: Comparison | None, why: str = "", missing: Missing | None = None
    ) -> None:
        model, folder = one.model, self._folder(one)
        result = OwnResult(
            run=one.run.run,
            task=one.run.task,
            at=time.time(),
            round=model.round if model else 0,
            digest=model.digest if model else "",
            model=_kind(one.run, model) if model else "",
            choice=model.choice if model else "",
            comparison=found,
            why=why,
            missing=missing,
        )
        is_news = found is not None or missing is not None
        result = replace(result, to_tell=is_news and self._sender.may_send(one.run, result))
        self._write_result(one, result)
        other_models.drop(self._home, one.run)
        if model is not None and model.nbytes > _KEPT_BYTES:
            own_results.model_file(folder, "shared").unlink(missing_ok=True)
        if found is not None:
            log.info("run %s: compared on %d held-out rows", result.run, found.rows)
            for line in comparisons.lines_of(found):
                owner_log.info("%s", line)
        else:
            owner_log.info("run %s: no comparison: %s", result.run, why)

    def _write_result(self, one: _Pending, result: OwnResult) -> None:
        file = own_results.result_file(self._folder(one))
        write_private(file, msgspec.json.encode(result))
        one.result = result
        if not result.to_tell:
            self._pending.pop(one.run.run)

    def _tell(self, one: _Pending, result: OwnResult) -> None:
        """Tell the coordinator, once. Raises Unreachable: it is tried again in the next session."""
        is_told = self._sender.send(one.run, result)
        self._write_result(one, replace(result, is_told=is_told, to_tell=False))


def _kind(run: OwnRun, model: NamedModel) -> str:
    """The kind of the best version, of a table; else empty."""
    known = run.settings_of(model.round) | model.settings
    return kind_of(run.task, known) or ""
