"""Manages the coordinator's runs: starts and queues them, runs one at a time, restores them."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from coordinator import strategies
from coordinator.fleet.registry import Registry
from coordinator.runs import deletion, retention, spec_rules, transitions
from coordinator.runs.apps import leftovers
from coordinator.runs.apps import rules as app_rules
from coordinator.runs.apps.loop import AppLoop
from coordinator.runs.compact import compact
from coordinator.runs.context import RunContext
from coordinator.runs.deletion import Deletion
from coordinator.runs.loop import RunLoop
from coordinator.runs.messages import ITS_TURN, round_body, run_body
from coordinator.runs.recorded import named_run, recorded_ids, recorded_run
from coordinator.runs.secure.decisions import is_over_for
from coordinator.runs.state import Run, accepted_uploads
from coordinator.runs.task_settings import ToldSettings
from coordinator.storage import installed_apps, run_events
from coordinator.storage.run_events import RunEvent, RunSpec, RunStarted
from coordinator.strategies import memory_estimate, personal
from protocols.errors import Awaited, CannotBeMet, CommonweightError, UnknownName
from protocols.local import flower_apps, heap
from protocols.local.failpoints import failpoint
from protocols.messages.envelope import EventLine
from protocols.messages.states import RunState
from protocols.messages.work import OpenSum
from protocols.model import personalization, weights

#: Runs whose rounds the monitor still shows after a restart.
_SHOWN_RUNS = 5
#: Well within an agent's timeout. Without an acknowledgment, the agent keeps its reply.
_ACK_TIMEOUT_S = 10.0


class RunManager:
    """All runs of the ledger. `known_tasks()`: the tasks that some online peer can run.

    Of ended runs, only the last rounds are in memory, without details of single peers, because a
    coordinator runs for months. `find` reads the rest from the ledger.
    """

    def __init__(
        self, ctx: RunContext, registry: Registry, known_tasks: Callable[[], set[str]]
    ) -> None:
        self._ctx, self._registry, self._known_tasks = ctx, registry, known_tasks
        self._runs: dict[str, Run] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self.current: RunLoop | AppLoop | None = None
        self._settings = ToldSettings()
        #: Deleted runs. After a crash, some of their files may still exist.
        self._deleted: list[Run] = []
        self._load()

    def _load(self) -> None:
        run_ids = recorded_ids(self._ctx.ledger)
        shown = frozenset(run_ids[-_SHOWN_RUNS:])
        for run_id in run_ids:
            run = self._replay(run_id)
            self._settings.note(run)
            if run.deleted:
                self._deleted.append(run)
                continue
            self._runs[run_id] = compact(run)
            if run_id in shown:
                self._ctx.publish(run_body(run, ""))
                for closed in run.history:
                    self._ctx.publish(round_body(run.id, closed))
        failpoint("runs.recalled")

    def _replay(self, run_id: str) -> Run:
        return recorded_run(self._ctx.ledger, run_id)

    def _append(self, run_id: str, *events: RunEvent) -> None:
        self._ctx.ledger.append(run_id, [run_events.encode(event) for event in events])

    async def work(self, resume: bool, until: str = "") -> None:
        """Do one run after the other, first those that were unfinished at the last exit.

        `until`: return when this run has ended.
        """
        while self._deleted:
            deletion.execute(self._plan(self._deleted.pop()), self._ctx.store)
        unfinished = [run for run in self._runs.values() if resume and not run.ended]
        self._ctx.store.uploads.keep_runs({run.id: accepted_uploads(run) for run in unfinished})
        for run in list(self._runs.values()):
            if run.ended:
                if leftovers.exist(app_rules.folder_of(self._ctx.store.home, run.id)):
                    self._tidy(run)
            elif resume:
                self._queue.put_nowait(run.id)
            else:
                self._end(run.id, "not resumed")
        while not (until and self._runs[until].ended):
            run_id = await self._queue.get()
            if run_id not in self._runs or self._runs[run_id].ended:
                continue  # it was stopped or deleted while it was queued
            run = self._runs[run_id]
            try:
                loop = AppLoop if app_rules.is_app(run.spec) else RunLoop
                self.current = loop(run, self._ctx, partial(self._protected_by_others, run.id))
            except CommonweightError as err:  # for example, its strategy is not installed any more
                self._end(run.id, err.message, RunState.FAILED)
                continue
            try:
                await self.current.drive()
            finally:
                self._runs[run.id] = compact(self.current.run)
                self._settings.note(self.current.run)
                self.current = None
            heap.trim()

    def _protected_by_others(self, run_id: str) -> set[str]:
        """Digests of the versions and states that the other runs keep."""
        digests: set[str] = set()
        for run in self.all():
            if run.id != run_id:
                versions = retention.versions_to_keep(run)
                digests |= versions | retention.states_to_keep(run, versions)
        if self.current is not None and self.current.run.id != run_id:
            digests |= self.current.on_disk | self._ctx.store.unrecorded
        return digests

    def wake(self) -> None:
        """Tell the active run that something has changed."""
        if self.current is not None:
            self.current.changed.set()

    def session_opened(self, peer: str) -> None:
        if self.current is not None:
            self.current.session_opened(peer)

    def owner_has_decided(self, peer: str) -> None:
        """The peer's owner has allowed or forbidden a task."""
        if self.current is not None:
            self.current.owner_has_decided(peer)

    def is_sum_over(self, peer: str, told: OpenSum) -> bool:
        """True if this peer is asked for no further step of this secure sum."""
        loop, run = self.current, self._runs.get(told.run)
        if loop is not None and loop.run.id == told.run:
            run = loop.run
        return run is None or is_over_for(run, peer, told)

    def is_over(self, run_id: str) -> bool:
        """True for a run that has ended. False for one that is not known."""
        loop, run = self.current, self._runs.get(run_id)
        if loop is not None and loop.run.id == run_id:
            run = loop.run
        return run is not None and run.ended

    def awaits(self, peer: str) -> tuple[str, Awaited] | None:
        """The task of the active run, and its decision that the run awaits from this peer's owner;
        None if it awaits none."""
        loop = self.current
        decision = loop.awaits(peer) if loop is not None else None
        return (loop.run.spec.task, decision) if loop is not None and decision else None

    def resend_doorbells(self) -> None:
        """The broker is back, and earlier doorbells may be lost: ring again."""
        if self.current is not None:
            self.current.requests.ring_again()

    def ack_future(self, mid: str) -> asyncio.Future[bool] | None:
        """The future for `acknowledged`; take it before the reply to this message is delivered."""
        return self.current.requests.ack_future(mid) if self.current is not None else None

    def is_awaited(self, mid: str) -> bool:
        """True if the active run waits for a reply to this message."""
        return self.current is not None and self.current.requests.is_awaited(mid)

    async def acknowledged(self, ack_future: asyncio.Future[bool] | None) -> bool:
        """True once the reply's result is in the ledger; False if it is not ours or takes long."""
        if ack_future is None:
            return False
        await asyncio.wait({ack_future}, timeout=_ACK_TIMEOUT_S)
        return ack_future.done() and ack_future.result()

    def start(self, spec: RunSpec, from_digest: str) -> str:
        """Record a run and queue it; its id. Raises UsageError, UnknownName or CannotBeMet.

        A refused run leaves no version behind: `from_digest` stays only if some run keeps it.
        """
        try:
            return self._queue_run(spec, from_digest)
        finally:
            if from_digest and from_digest not in self._protected_by_others(""):
                self._ctx.store.drop(from_digest)

    def _queue_run(self, spec: RunSpec, from_digest: str) -> str:
        self._check(spec)
        if self.current is not None:
            self._settings.note(self.current.run)
        self._settings.check(spec)
        if from_digest:
            from_digest = self._first_version(spec, from_digest)
        task = re.sub(r"[^A-Za-z0-9_]+", "-", spec.task).strip("-_")[:48] or "run"
        run_id = f"{task}-{secrets.token_hex(3)}"
        first = [run_events.WeightsInitialised(from_digest, "file")] if from_digest else []
        self._append(run_id, RunStarted(spec, time.time()), *first)
        failpoint("runs.queued")
        self._enqueue(run_id)
        return run_id

    def _enqueue(self, run_id: str) -> None:
        self._runs[run_id] = self._replay(run_id)
        self._ctx.publish(run_body(self._runs[run_id], ITS_TURN))
        self._queue.put_nowait(run_id)

    def _first_version(self, spec: RunSpec, digest: str) -> str:
        """The digest of a version as the run starts with it.

        Some strategies add control variates to it, some leave out layers.
        """
        store, adapter = self._ctx.store, strategies.find(spec.strategy)
        if not store.has(digest):
            raise UnknownName(f"no version {digest[:12]}")
        model = weights.load(store.version_path(digest))
        first = personalization.first_version(model, personal.trainer_settings(spec))
        memory_estimate.check_memory(adapter, spec, first.schema, spec.quorum)
        return digest if first.schema == model.schema else store.save(first)

    def _check(self, spec: RunSpec) -> None:
        if app_rules.is_app(spec):
            app_rules.check(spec)
            name = app_rules.name_of(spec)
            card, _ = installed_apps.find(self._ctx.store.home, name, spec.app)
            flower_apps.fuse(card.config, spec.settings)
        else:
            spec_rules.check(spec)
        self._registry.check_quorum(spec.quorum)
        spec_rules.check_known(spec, self._known_tasks())

    def is_driven(self, run_id: str) -> bool:
        """Whether a loop drives the run. It records its end; the end of another run is recorded
        by `stop`."""
        return self.current is not None and self.current.run.id == run_id

    def stop(self, run_id: str) -> None:
        """End a run at its next step, or at once if it is not active."""
        if self.current is not None and self.current.run.id == run_id:
            self.current.stop("stopped by the operator")
        elif not self._runs[run_id].ended:
            self._end(run_id, "stopped by the operator")

    def resume(self, run_id: str) -> None:
        """Continue a stopped or failed run. Raises UnknownName, CannotBeMet."""
        run = self.find(run_id)
        if not run.ended:
            raise CannotBeMet(f"run {run.id} has not ended: {run.state}", "commonweight run list")
        if run.state is RunState.FINISHED:
            raise CannotBeMet(
                f"run {run.id} has finished: {run.ended_because}",
                "commonweight models export, and run start --from that file, for more rounds",
            )
        if app_rules.is_app(run.spec):
            raise CannotBeMet("a ServerApp cannot be resumed", "start it again")
        self._check(run.spec)
        self._append(run.id, run_events.RunResumed())
        self._enqueue(run.id)

    def deletion(self, run_id: str) -> Deletion:
        """What `delete` would delete. Raises UnknownName, CannotBeMet if the run has not ended."""
        run = self.find(run_id, newest=False)
        if self.is_driven(run.id) or not run.ended:
            raise CannotBeMet(
                f"run {run.id} has not ended: {run.state}", f"commonweight run stop {run.id}"
            )
        return self._plan(run)

    def _plan(self, run: Run) -> Deletion:
        protected = self._protected_by_others(run.id)
        if self.current is not None and self.current.run.state is RunState.AGGREGATING:
            # The active run may be writing the same states, which the ledger does not name yet.
            # The next start of the coordinator deletes them.
            protected |= retention.all_states(run)
        return deletion.plan(run, protected, self._ctx.store)

    def delete(self, run_id: str) -> Deletion:
        """Delete the files of an ended run and stop listing it. Raises the errors of `deletion`."""
        plan = self.deletion(run_id)
        event = run_events.RunDeleted((*plan.versions, *plan.in_use), plan.states, plan.nbytes)
        self._append(plan.run, event)
        deleted = transitions.apply(self._runs.pop(plan.run), event)
        deletion.execute(plan, self._ctx.store)
        text = f"run {plan.run} was deleted: {plan.nbytes / 1e6:,.1f} MB"
        self._ctx.publish(run_body(deleted, ""))
        self._ctx.publish(EventLine(level="info", text=text, subject=plan.run))
        return plan

    def record_comparison(self, run_id: str, event: run_events.PeerCompared) -> None:
        """Record what an ended run brought to a peer, and tell the monitors that there is news;
        `find` reads it."""
        self._append(run_id, event)
        run = self._runs[run_id]
        self._runs[run_id] = replace(run, num_compared=run.num_compared + 1)
        self._ctx.publish(run_body(self._runs[run_id], ""))

    def _end(self, run_id: str, because: str, state: RunState = RunState.STOPPED) -> None:
        self._append(run_id, run_events.RunEnded(state, because))
        run = self._replay(run_id)
        self._tidy(run)
        self._runs[run_id] = compact(run)
        self._ctx.publish(run_body(run, ""))

    def _tidy(self, run: Run) -> None:
        """Delete what an ended run does not keep."""
        store, protected = self._ctx.store, partial(self._protected_by_others, run.id)
        retention.Retention(run, store, protected).prune(run)
        store.uploads.delete_run(run.id)
        leftovers.delete(app_rules.folder_of(store.home, run.id))

    def find(self, name: str, *, newest: bool = True) -> Run:
        """A run by its name, as `named_run` finds it. Raises UnknownName."""
        run = named_run(self.all(), name, newest=newest)
        return self._replay(run.id) if run.ended else run

    def all(self) -> list[Run]:
        """All runs, oldest first. Ended runs have only their last rounds."""
        if self.current is not None:
            self._runs[self.current.run.id] = self.current.run
        return list(self._runs.values())
