"""The coordinator's runs: started, queued, worked on one by one, recalled after a restart."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec.structs import replace

from coordinator import strategies
from coordinator.fleet.registry import SUBJECT, Registry
from coordinator.runs import (
    best_version,
    buffered,
    deletion,
    late_updates,
    options,
    retention,
    transitions,
)
from coordinator.runs.context import RunContext
from coordinator.runs.deletion import Deletion
from coordinator.runs.loop import RunLoop
from coordinator.runs.messages import round_body, run_body
from coordinator.runs.state import Round, Run
from coordinator.storage import job_events, run_events
from coordinator.storage.run_events import RunSpec, RunStarted
from coordinator.strategies import memory_estimate
from protocols.codecs import registry as codecs
from protocols.errors import CannotBeMet, CommonweightError, UnknownName, UsageError
from protocols.failpoints import failpoint
from protocols.local import heap
from protocols.messages.envelope import EventLine
from protocols.messages.states import RunState
from protocols.model import personalization, weights

#: Runs whose rounds the monitor still sees after a restart.
_SHOWN_RUNS = 5
#: What a round tells of single peers, or for plots.
_OF_PEERS = ("norms", "spread", "worst", "tallies", "spent", "staleness")
#: Well within an agent's patience. One that hears no more than that keeps its answer.
_ACK_TIMEOUT_S = 10.0


class RunManager:
    """All runs of the ledger. `known_tasks()` are those that some present peer can run.

    Of runs that have ended only the last rounds are kept in memory, whose versions may still be
    there, and nothing of single peers: a coordinator lives for months. `find` reads all of it in
    the ledger.
    """

    def __init__(
        self, ctx: RunContext, registry: Registry, known_tasks: Callable[[], set[str]]
    ) -> None:
        self._ctx, self._registry, self._known_tasks = ctx, registry, known_tasks
        self._runs: dict[str, Run] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self.current: RunLoop | None = None
        #: Deleted runs of the last life, of which a crash may have left files.
        self._deleted: list[Run] = []
        self._load()

    def _load(self) -> None:
        found = [
            subject
            for subject in self._ctx.ledger.subjects()
            if subject != SUBJECT and not subject.startswith(job_events.PREFIX)
        ]
        shown = frozenset(found[-_SHOWN_RUNS:])
        for subject in found:
            run = self._replay(subject)
            if run.deleted:
                self._deleted.append(run)
                continue
            self._runs[subject] = _compact(run)
            if subject in shown:
                self._ctx.publish(run_body(run, ""))
                for closed in run.history:
                    self._ctx.publish(round_body(run.id, closed))
        failpoint("runs.recalled")

    def _replay(self, run_id: str) -> Run:
        """A run with all its rounds, as the ledger has it."""
        past = [run_events.decode(entry.body) for entry in self._ctx.ledger.entries(run_id)]
        return transitions.replay(run_id, past)

    async def work(self, resume: bool) -> None:
        """One run after the other, unfinished ones of the last life first."""
        for deleted in self._deleted:
            deletion.execute(self._plan(deleted), self._ctx.store)
        self._deleted = []
        for run in list(self._runs.values()):
            if not run.ended:
                if resume:
                    self._queue.put_nowait(run.id)
                else:
                    self._end(run.id, "not resumed")
        while True:
            found = self._runs.get(await self._queue.get())
            if found is None or found.ended:  # it was stopped in the queue, or even deleted
                continue
            run = found
            try:
                self.current = RunLoop(run, self._ctx, partial(self._protected_by_others, run.id))
            except CommonweightError as err:  # its strategy is not installed any more, say
                self._end(run.id, err.message, RunState.FAILED)
                continue
            try:
                await self.current.drive()
            finally:
                self._runs[run.id] = _compact(self.current.run)
                self.current = None
            heap.trim()

    def _protected_by_others(self, run_id: str) -> set[str]:
        """Digests of the versions and states that all runs but this one keep."""
        kept: set[str] = set()
        for run in self.all():
            if run.id != run_id:
                versions = retention.versions_to_keep(run)
                kept |= versions | retention.states_to_keep(run, versions)
        if self.current is not None and self.current.run.id != run_id:
            kept |= self.current.on_disk | self._ctx.store.unrecorded
        return kept

    def wake(self) -> None:
        """Something changed that the run in work may care for."""
        if self.current is not None:
            self.current.changed.set()

    def session_opened(self, peer: str) -> None:
        if self.current is not None:
            self.current.session_opened(peer)

    def resend_doorbells(self) -> None:
        """The broker is back: doorbells of before may be lost."""
        if self.current is not None:
            self.current.requests.ring_again()

    def ack_future(self, question: str) -> asyncio.Future[bool] | None:
        """For `settled`: to be asked before the reply to this question is handed in."""
        return self.current.requests.ack_future(question) if self.current is not None else None

    async def acknowledged(self, settling: asyncio.Future[bool] | None) -> bool:
        """Wait until a reply's fate is in the ledger; False if it is none of ours or takes long."""
        if settling is None:
            return False
        await asyncio.wait({settling}, timeout=_ACK_TIMEOUT_S)
        return settling.done() and settling.result()

    def start(self, spec: RunSpec, from_digest: str) -> str:
        """Record a run and queue it; return its id. Raises UsageError and its kin.

        Afterwards the version `from_digest` stays only if a run keeps it: a refused run leaves
        none behind.
        """
        try:
            return self._queue_run(spec, from_digest)
        finally:
            if from_digest and from_digest not in self._protected_by_others(""):
                self._ctx.store.drop(from_digest)

    def _queue_run(self, spec: RunSpec, from_digest: str) -> str:
        self._check(spec)
        if from_digest:
            from_digest = self._first_version(spec, from_digest)
        task = re.sub(r"\W+", "-", spec.task)[:48]
        run_id = f"{task}-{secrets.token_hex(3)}"
        news: list[run_events.RunEvent] = [RunStarted(spec, time.time())]
        if from_digest:
            news.append(run_events.WeightsInitialised(from_digest, "file"))
        self._ctx.ledger.append(run_id, [run_events.encode(event) for event in news])
        failpoint("runs.queued")
        self._runs[run_id] = transitions.replay(run_id, news)
        self._ctx.publish(run_body(self._runs[run_id], "its turn"))
        self._queue.put_nowait(run_id)
        return run_id

    def _first_version(self, spec: RunSpec, digest: str) -> str:
        """The digest of a version as the run starts with it.

        Some strategies add control variates to it, some leave out layers.
        """
        store, adapter = self._ctx.store, strategies.find(spec.strategy)
        if not store.has(digest):
            raise UnknownName(f"no version {digest[:12]}")
        given = weights.load(store.version_path(digest))
        first = personalization.first_version(given, adapter.trainer_settings(spec.strategy_args))
        memory_estimate.check_memory(adapter, spec, first.schema, spec.quorum)
        return digest if first.schema == given.schema else store.save(first)

    def _check(self, spec: RunSpec) -> None:
        if taken := sorted(personalization.SETTINGS & spec.settings.keys()):
            raise UsageError(
                f"{taken[0]} is no setting of a task: the strategy says it",
                "--strategy scaffold or fedbn, with --strategy-arg",
            )
        options.check(spec)
        buffered.check(spec, strategies.find(spec.strategy))
        strategies.check(spec)
        codecs.parse(spec.codec)
        self._registry.check_quorum(spec.quorum)
        if spec.min_examples > spec.max_examples:
            raise UsageError(f"--min-examples must be at most {spec.max_examples}")
        late_updates.check(spec, strategies.find(spec.strategy))
        if spec.best_direction and not spec.best_metric:
            raise UsageError("--best-direction needs --best-metric")
        best_version.check(spec)
        known = self._known_tasks()
        if known and spec.task not in known:
            raise UnknownName(
                f"no peer can run the task {spec.task!r}",
                f"tasks of the peers that are here: {', '.join(sorted(known))}; one of your own: "
                "commonweight-agent task add, on each machine",
            )

    def stop(self, run_id: str) -> None:
        """End a run at its next step, or at once if it is not in work."""
        if self.current is not None and self.current.run.id == run_id:
            self.current.stop("stopped by the operator")
        elif not self._runs[run_id].ended:
            self._end(run_id, "stopped by the operator")

    def resume(self, run_id: str) -> None:
        """Let a run that was stopped or has failed go on. Raises CannotBeMet."""
        run = self.find(run_id)
        if not run.ended:
            raise CannotBeMet(f"run {run.id} has not ended: {run.state}", "commonweight run list")
        if run.state is RunState.FINISHED:
            raise CannotBeMet(
                f"run {run.id} has finished: {run.ended_because}",
                "commonweight models export, and run start --from that file, for more rounds",
            )
        self._check(run.spec)
        event = run_events.RunResumed()
        self._ctx.ledger.append(run.id, [run_events.encode(event)])
        self._runs[run.id] = self._replay(run.id)
        self._ctx.publish(run_body(self._runs[run.id], "its turn"))
        self._queue.put_nowait(run.id)

    def deletion(self, run_id: str) -> Deletion:
        """What `delete` would delete. Raises UnknownName, and CannotBeMet if it has not ended."""
        run = self.find(run_id)
        at_work = self.current is not None and self.current.run.id == run.id
        if at_work or not run.ended:
            raise CannotBeMet(
                f"run {run.id} has not ended: {run.state}", f"commonweight run stop {run.id}"
            )
        return self._plan(run)

    def _plan(self, run: Run) -> Deletion:
        kept = self._protected_by_others(run.id)
        current = self.current.run if self.current is not None else None
        if current and current.state is RunState.AGGREGATING:
            # It may be writing the same states, which the ledger does not name yet. The next start
            # deletes what stays here.
            kept |= retention.all_states(run)
        return deletion.plan(run, kept, self._ctx.store)

    def delete(self, run_id: str) -> Deletion:
        """Delete the files of an ended run and list it no more. Raises as `deletion` does."""
        found = self.deletion(run_id)
        event = run_events.RunDeleted((*found.versions, *found.in_use), found.states, found.nbytes)
        self._ctx.ledger.append(found.run, [run_events.encode(event)])
        deleted = transitions.apply(self._runs.pop(found.run), event)
        deletion.execute(found, self._ctx.store)
        text = f"run {found.run} was deleted: {found.nbytes / 1e6:,.1f} MB"
        self._ctx.publish(run_body(deleted, ""))
        self._ctx.publish(EventLine(level="info", text=text, subject=found.run))
        return found

    def _end(self, run_id: str, because: str, state: RunState = RunState.STOPPED) -> None:
        event = run_events.RunEnded(state, because)
        self._ctx.ledger.append(run_id, [run_events.encode(event)])
        run = transitions.apply(self._runs[run_id], event)
        self._runs[run_id] = _compact(run)
        self._ctx.publish(run_body(run, ""))

    def find(self, run_id: str) -> Run:
        """A run by its id or the beginning of it. Raises UnknownName."""
        found = [run for run in self.all() if run.id.startswith(run_id)]
        if len(found) != 1:
            raise UnknownName(f"no run {run_id!r}", "commonweight run list")
        return self._replay(found[0].id) if found[0].ended else found[0]

    def all(self) -> list[Run]:
        """Every run, oldest first; ended ones with their last rounds."""
        if self.current is not None:
            self._runs[self.current.run.id] = self.current.run
        return list(self._runs.values())


def _compact(run: Run) -> Run:
    """The run, if it has ended without early rounds and what was told of single peers."""
    if not run.ended:
        return run
    return replace(
        run,
        history=tuple(map(_compact_round, run.history[-run.spec.keep_versions :])),
        best=_compact_round(run.best) if run.best else None,
        described={},
        peers={},
        updates={},
        contributors=(),
        norms={},
        training_seconds={},
        holdings={},
        assignments={},
        last_assignments={},
        buffer=(),
        cooling_down=frozenset(),
        excluded=frozenset(),
        staleness={},
    )


def _compact_round(closed: Round) -> Round:
    nobody: dict[str, Any] = {name: {} for name in _OF_PEERS}
    return replace(closed, contributors=(), **nobody)
