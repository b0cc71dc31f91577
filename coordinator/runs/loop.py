"""Drives one run: does what `decisions.decide` says, and writes down what came of it.

The loop waits on one event: replies that arrived, peers that came or went, a stop. Facts are in the
ledger before anything is sent because of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Set

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from coordinator import strategies
from coordinator.runs import aggregation, decisions, recovery, retention, schema_agreement
from coordinator.runs.acceptance import validate_reply
from coordinator.runs.context import RunContext
from coordinator.runs.decisions import Observation, Step
from coordinator.runs.messages import round_body
from coordinator.runs.model import RunModel
from coordinator.runs.recorder import RunRecorder
from coordinator.runs.requests import PendingRequests, Request
from coordinator.runs.retention import Retention
from coordinator.runs.state import Run
from coordinator.runs.timing import PhaseTimer
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from coordinator.strategies import memory_estimate
from coordinator.strategies.state import StateStore
from coordinator.transport.upload_limits import MAX_UPLOADS
from protocols.codecs import registry
from protocols.errors import CommonweightError, DiskFull, HomeError, UpdateRefused
from protocols.failpoints import failpoint
from protocols.local.disk_space import is_disk_full
from protocols.messages.states import RunState

log = logging.getLogger("commonweight.run")

#: How long peers that were at work may take to come back after the coordinator's restart.
RECONNECT_GRACE_S = 20.0
_SHORTAGE_RETRY_S = 5.0


class RunLoop:
    """One run in work. `changed` is set by whoever has news for it, in the loop's thread.

    `elsewhere()`: versions and states that other runs keep. Raises CommonweightError if the run's
    strategy cannot be made.
    """

    def __init__(
        self, run: Run, ctx: RunContext, elsewhere: Callable[[], Set[str]] = frozenset
    ) -> None:
        self._timer = PhaseTimer()
        self._recorder = RunRecorder(run, ctx, self._timer)
        self.changed = asyncio.Event()
        self._ctx = ctx
        self._adapter = strategies.find(run.spec.strategy)
        self._strategy: Strategy = self._adapter.make(run.spec.strategy_args)
        self._states = StateStore(ctx.store.states)
        self._model = RunModel(ctx.transfer, registry.parse(run.spec.codec))
        folds = run.spec.late == "fold"
        ctx.transfer.limits.max_uploads = MAX_UPLOADS + run.spec.buffer + folds
        self.requests = PendingRequests(ctx, self._adapter, self._strategy, self._model)
        self._retention = Retention(run, ctx.store, self._states, elsewhere)
        # After a restart nobody has come back yet: that is no reason to call them lost.
        self._grace_until = (
            time.monotonic() + RECONNECT_GRACE_S if run.pending or run.assignments else 0.0
        )
        self._bytes_at_open = (0, 0)
        self._stop_reason = ""
        self._shortage_reported = self._memory_checked = False

    # --- from outside ---

    def stop(self, because: str) -> None:
        """End the run at the next step; what is committed stays."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        self._recorder.incompatible.discard(peer)
        self.requests.cancel_from(peer)
        self.changed.set()

    @property
    def run(self) -> Run:
        """Where it stands now."""
        return self._recorder.run

    @property
    def on_disk(self) -> Set[str]:
        """Digests of its versions, also of older ones that peers still train on."""
        return self._retention.on_disk

    @property
    def waiting_for(self) -> str:
        return self._recorder.waiting_for

    # --- the loop ---

    async def drive(self) -> Run:
        """Work until the run has ended. Raises what the ledger or the disk raises."""
        try:
            return await self._driven()
        finally:
            self._recorder.announce_now()

    async def _driven(self) -> Run:
        if self.run.head and not self.run.recalling:
            await self._find_whole_version()
        if self.run.head and not (self.run.ended or self.run.recalling):
            self._model.set_version(self.run.head)
        self._recorder.announce()
        goes_on = f"goes on in round {self.run.round}" if self.run.round else "started"
        self._recorder.report("info", f"run {self.run.id} {goes_on}")
        while not self.run.ended:
            self.changed.clear()
            try:
                await self._step()
            except (OSError, DiskFull) as err:
                if not is_disk_full(err):
                    raise
                await self._recorder.wait_for_space(err)  # nothing was decided: the same again
            except HomeError:  # the disk's fault and not the run's: it goes on later
                raise
            except CommonweightError as err:
                log.error("run %s failed: %s", self.run.id, err.message)
                await self._recorder.record(run_events.RunEnded(RunState.FAILED, err.message))
        self.requests.cancel_all()
        await self._collect()
        text = f"run {self.run.id} {self.run.state}: {self.run.ended_because}"
        self._recorder.report("error" if self.run.state is RunState.FAILED else "info", text)
        return self.run

    async def _find_whole_version(self) -> None:
        """Go back to the newest version that is not damaged on disk; end if there is none."""
        head, is_whole = self.run.head, self._ctx.store.verify_digest
        found = await asyncio.to_thread(retention.newest_intact, self.run, is_whole)
        if found == head:
            return
        lost = f"version {head[:12]} is damaged on disk"
        if found:
            await self._recorder.record(run_events.VersionLost(head, found))
            words = f"{lost}: run {self.run.id} goes on from {found[:12]}"
            self._recorder.report("warning", words)
        else:
            because = f"{lost}, and no earlier one is whole"
            await self._recorder.record(run_events.RunEnded(RunState.FAILED, because))

    async def _step(self) -> None:
        """Do what there is to do now. What a full disk interrupts can be done again."""
        folds = self.run.buffered or self.run.spec.late == "fold"
        if not (folds and self.run.state is RunState.AGGREGATING):
            await self._collect()  # else what comes now belongs to no buffer yet
        await self._record_losses()
        if self.run.assignments:
            self.requests.cancel_overdue(self.run.spec.deadline_s)
            await self.requests.send_assignments(self.run)
        await self.requests.send_pending(self.run)
        if self._stop_reason:
            await self._recorder.record(run_events.RunEnded(RunState.STOPPED, self._stop_reason))
            return
        await self._execute(decisions.decide(self.run, self._observe()))

    def _observe(self) -> Observation:
        due = self._timer.phase_s >= decisions.phase_deadline_s(self.run)
        eligible = self._ctx.eligible() - self._recorder.incompatible
        free = eligible
        if self.run.spec.late == "fold":  # who is still at an older round's work gets no other
            free = eligible - self.requests.late_bases(self.run).keys()
        return Observation(free if len(free) >= self.run.spec.quorum else eligible, due)

    async def _execute(self, step: Step) -> None:
        match step:
            case decisions.Wait(what):
                await self._wait(what)
            case decisions.AgreeSchema():
                await self._agree()
            case recovery.FetchVersion(version):
                self._timer.open_phase()
                await self._recorder.record(run_events.VersionSought(version))
            case recovery.KeepOwn():
                own = run_events.Holding(self.run.round, self.run.head)
                self._model.set_version(own.digest)
                state = retention.state_of(self.run, own, self._ctx.store)
                await self._recorder.record(run_events.VersionRecalled(own, "backup", state))
            case decisions.AskInit(peer):
                self._timer.open_phase()
                await self._recorder.record(run_events.PeersAsked((peer,)))
            case decisions.AskPeers(peers):
                # Not whenever a peer comes back: one that comes and goes would hold up the round.
                if self._observe().deadline_passed:
                    self._timer.open_phase()
                self.requests.cancel_current(self.run, peers)
                await self._recorder.record(run_events.PeersAsked(peers))
            case decisions.AssignWork(given):
                if self._observe().deadline_passed:
                    self._timer.open_phase()
                await self._recorder.record(*given)
            case decisions.OpenRound():
                await self._open_round(step)
            case decisions.CloseTraining(contributors):
                await self._recorder.record(run_events.TrainingClosed(self.run.round, contributors))
            case decisions.Aggregate(contributors):
                await self._aggregate(contributors)
            case decisions.OpenEvaluation(eligible):
                chosen = decisions.select_peers(self.run, self.run.round, eligible)
                asked = await self.requests.configure(self.run, chosen)
                self._timer.open_phase()
                await self._recorder.record(run_events.EvaluationOpened(self.run.round, asked))
            case decisions.CloseRound():
                await self._close_round()
            case decisions.EndRun(state, because):
                await self._recorder.record(run_events.RunEnded(state, because))

    async def _wait(self, what: str) -> None:
        for peer in self.run.pending:
            what = what.replace(peer, self._ctx.name_of(peer))
        if shortage := self._ctx.transfer.limits.shortage:
            if not self._shortage_reported:
                self._recorder.report("error", f"no {shortage}: updates wait at the peers")
            what = f"{shortage}, then {what}"
        self._shortage_reported = bool(shortage)
        self._recorder.set_waiting_for(what)
        timed = self.run.state is not RunState.WAITING or bool(self.run.peers)
        ahead = [decisions.phase_deadline_s(self.run) - self._timer.phase_s] if timed else []
        ahead.append(self._grace_until - time.monotonic())
        if self.run.assignments:
            ahead.append(self.run.spec.deadline_s)
        if shortage:
            ahead.append(_SHORTAGE_RETRY_S)
        timeout = min((wait_s for wait_s in ahead if wait_s > 0), default=None)
        try:
            # Not wait_for: before Python 3.12 it loses a cancel that comes together with the news.
            async with asyncio.timeout(timeout):
                await self.changed.wait()
        except TimeoutError:
            pass  # the deadline: decide again

    async def _record_losses(self) -> None:
        if time.monotonic() < self._grace_until:
            return
        eligible = self._ctx.eligible()
        at_work = {peer for peer, given in self.run.assignments.items() if not given.lost}
        lost = sorted((at_work | set(self.run.pending)) - eligible)
        for peer in lost:
            self.session_opened(peer)  # take back what it was sent
            self._recorder.report(
                "warning", f"{self._ctx.name_of(peer)} went away in its work", peer
            )
        await self._recorder.record(*(run_events.PeerLost(peer, "went away") for peer in lost))

    async def _collect(self) -> None:
        """Judge the answers that are there, and write down what becomes of each."""
        answers = await self.requests.take_replies()
        # At the same time: to measure large updates takes as long as to receive them.
        news = await asyncio.gather(*(self._validate(asked, reply) for _, asked, reply in answers))
        await self._recorder.record(*news)
        self._ctx.store.mark_recorded(self.run.head)  # first weights, or a version from a peer
        if self.run.buffered:
            self._drop_unused_uploads({asked.peer for _, asked, _ in answers})
        self.requests.acknowledge([question for question, _, _ in answers], True)

    async def _validate(self, asked: Request, reply: Message) -> RunEvent:
        try:
            return await validate_reply(self.run, self._ctx, self._model, asked, reply)
        except UpdateRefused as err:
            text, seconds = err.message[:400], asked.seconds
            return run_events.UpdateRefused(
                asked.round, asked.peer, err.reason, text, asked.kind, seconds
            )

    def _drop_unused_uploads(self, peers: set[str]) -> None:
        """Drop the uploads of these peers, who have none under way, that count for nothing."""
        for peer in peers - self.run.assignments.keys():
            counted = {a.update.digest for a in self.run.buffer if a.peer == peer}
            self._ctx.store.uploads.keep_only(peer, counted)

    async def _agree(self) -> None:
        found = schema_agreement.agree(self.run, self._model.schema)
        await self._recorder.record(*found.events)
        for peer, words in found.notes:
            name = f"{self._ctx.name_of(peer)}: " if peer else ""
            self._recorder.report("warning", f"{name}{words}", peer)

    # --- rounds ---

    async def _open_round(self, step: decisions.OpenRound) -> None:
        if not self._memory_checked:  # the first of this life: it is known now who is here
            self._memory_checked = True
            self._recorder.memory_bytes, warning = memory_estimate.check_memory(
                self._adapter, self.run.spec, self._model.schema, len(step.eligible)
            )
            if warning:
                self._recorder.report("warning", warning)
        self._timer.open_round()
        transfer = self._ctx.transfer
        self._bytes_at_open = (transfer.bytes_up, transfer.bytes_down)
        asked: tuple[str, ...] = ()
        if not self.run.buffered:  # there each peer has work of its own
            chosen = decisions.select_peers(self.run, step.round, step.eligible)
            asked = await self.requests.configure(self.run, chosen, opening=step.round)
        failpoint("round.configured")
        await self._recorder.record(
            run_events.RoundOpened(step.round, step.base, asked, len(step.eligible))
        )

    async def _aggregate(self, contributors: tuple[str, ...]) -> None:
        run, store = self.run, self._ctx.store
        made = await asyncio.to_thread(
            aggregation.commit, run, store, self._states, self._strategy, contributors
        )
        await self._recorder.record(
            run_events.VersionCommitted(
                run.round, made.digest, run.head, contributors, made.metrics, made.state
            )
        )
        store.mark_recorded(made.digest)
        if run.buffered:
            self._drop_unused_uploads({accepted.peer for accepted in run.buffer})
        elif run.spec.late == "fold":
            store.uploads.clear(keep_of=self.requests.late_bases(self.run).keys())
        else:
            store.uploads.clear()
        await asyncio.to_thread(self._model.make_patch, run.head, made.digest)
        self.requests.clear_work()

    async def _close_round(self) -> None:
        run, transfer = self.run, self._ctx.transfer
        found = aggregation.aggregate_evaluation(run, self._strategy)
        event = run_events.RoundClosed(
            run.round,
            found.metrics,
            self._timer.round_s,
            transfer.bytes_up - self._bytes_at_open[0],
            transfer.bytes_down - self._bytes_at_open[1],
            self._timer.phase_seconds(),
            found.tallies,
        )
        self.requests.clear_work()
        # What is still under way from the round before is late by more than a round.
        if run.buffered:
            self.requests.cancel_evaluations()
        else:
            self.requests.cancel_expired(run)
        await self._recorder.record(event)
        self._ctx.publish(round_body(self.run.id, self.run.history[-1]))
        self._retention.prune(self.run, self.requests.late_bases(self.run).values())
