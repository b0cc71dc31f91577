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
from coordinator.runs.acceptance import judge
from coordinator.runs.context import Fleetwork
from coordinator.runs.decisions import Step, View
from coordinator.runs.messages import round_body
from coordinator.runs.model import Model
from coordinator.runs.recorder import Chronicle
from coordinator.runs.requests import Asked, Questions
from coordinator.runs.retention import Retention
from coordinator.runs.state import Run
from coordinator.runs.timing import Stopwatch
from coordinator.storage import run_events
from coordinator.storage.run_events import Fact
from coordinator.strategies import memory_estimate
from coordinator.strategies.state import States
from coordinator.transport.upload_limits import MAX_UPLOADS
from protocols.codecs import registry
from protocols.errors import CommonweightError, DiskFull, HomeFault, UpdateRefused
from protocols.failpoints import failpoint
from protocols.local.disk_space import is_full
from protocols.messages.states import RunState

log = logging.getLogger("commonweight.run")

#: How long peers that were at work may take to come back after the coordinator's restart.
RETURN_WITHIN_S = 20.0
_SHORTAGE_AGAIN_S = 5.0


class RunLoop:
    """One run in work. `changed` is set by whoever has news for it, in the loop's thread.

    `elsewhere()`: versions and states that other runs keep. Raises CommonweightError if the run's
    strategy cannot be made.
    """

    def __init__(
        self, run: Run, around: Fleetwork, elsewhere: Callable[[], Set[str]] = frozenset
    ) -> None:
        self._watch = Stopwatch()
        self._chronicle = Chronicle(run, around, self._watch)
        self.changed = asyncio.Event()
        self._around = around
        self._recipe = strategies.find(run.spec.strategy)
        self._strategy: Strategy = self._recipe.make(run.spec.strategy_args)
        self._states = States(around.lane.states)
        self._model = Model(around.transfer, registry.find(run.spec.codec))
        folds = run.spec.late == "fold"
        around.transfer.limits.max_uploads = MAX_UPLOADS + run.spec.buffer + folds
        self.questions = Questions(around, self._recipe, self._strategy, self._model)
        self._retention = Retention(run, around.lane, self._states, elsewhere)
        # After a restart nobody has come back yet: that is no reason to call them lost.
        self._patient_until = (
            time.monotonic() + RETURN_WITHIN_S if run.pending or run.given else 0.0
        )
        self._bytes_at_open = (0, 0)
        self._stop_reason = ""
        self._told_shortage = self._told_memory = False

    # --- from outside ---

    def stop(self, because: str) -> None:
        """End the run at the next step; what is committed stays."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        self._chronicle.misfits.discard(peer)
        self.questions.take_back_from(peer)
        self.changed.set()

    @property
    def run(self) -> Run:
        """Where it stands now."""
        return self._chronicle.run

    @property
    def on_disk(self) -> Set[str]:
        """Digests of its versions, also of older ones that peers still train on."""
        return self._retention.on_disk

    @property
    def waiting_for(self) -> str:
        return self._chronicle.waiting_for

    # --- the loop ---

    async def drive(self) -> Run:
        """Work until the run has ended. Raises what the ledger or the disk raises."""
        try:
            return await self._driven()
        finally:
            self._chronicle.announce_now()

    async def _driven(self) -> Run:
        if self.run.head and not self.run.recalling:
            await self._find_whole_version()
        if self.run.head and not (self.run.ended or self.run.recalling):
            self._model.learn(self.run.head)
        self._chronicle.announce()
        goes_on = f"goes on in round {self.run.round}" if self.run.round else "started"
        self._chronicle.say("info", f"run {self.run.id} {goes_on}")
        while not self.run.ended:
            self.changed.clear()
            try:
                await self._turn()
            except (OSError, DiskFull) as err:
                if not is_full(err):
                    raise
                await self._chronicle.wait_for_room(err)  # nothing was decided: the same again
            except HomeFault:  # the disk's fault and not the run's: it goes on later
                raise
            except CommonweightError as err:
                log.error("run %s failed: %s", self.run.id, err.message)
                await self._chronicle.record(run_events.RunEnded(RunState.FAILED, err.message))
        self.questions.take_back_all()
        await self._collect()
        text = f"run {self.run.id} {self.run.state}: {self.run.ended_because}"
        self._chronicle.say("error" if self.run.state is RunState.FAILED else "info", text)
        return self.run

    async def _find_whole_version(self) -> None:
        """Go back to the newest version that is not damaged on disk; end if there is none."""
        head, is_whole = self.run.head, self._around.lane.is_whole
        found = await asyncio.to_thread(retention.newest_whole, self.run, is_whole)
        if found == head:
            return
        lost = f"version {head[:12]} is damaged on disk"
        if found:
            await self._chronicle.record(run_events.VersionLost(head, found))
            words = f"{lost}: run {self.run.id} goes on from {found[:12]}"
            self._chronicle.say("warning", words)
        else:
            because = f"{lost}, and no earlier one is whole"
            await self._chronicle.record(run_events.RunEnded(RunState.FAILED, because))

    async def _turn(self) -> None:
        """Do what there is to do now. What a full disk interrupts can be done again."""
        folds = self.run.buffered or self.run.spec.late == "fold"
        if not (folds and self.run.state is RunState.AGGREGATING):
            await self._collect()  # else what comes now belongs to no buffer yet
        await self._notice_losses()
        if self.run.given:
            self.questions.take_back_silent(self.run.spec.deadline_s)
            await self.questions.ask_given(self.run)
        await self.questions.ask_pending(self.run)
        if self._stop_reason:
            await self._chronicle.record(run_events.RunEnded(RunState.STOPPED, self._stop_reason))
            return
        await self._do(decisions.decide(self.run, self._view()))

    def _view(self) -> View:
        due = self._watch.phase_s >= decisions.deadline_s(self.run)
        eligible = self._around.eligible() - self._chronicle.misfits
        free = eligible
        if self.run.spec.late == "fold":  # who is still at an older round's work gets no other
            free = eligible - self.questions.trained_on(self.run).keys()
        return View(free if len(free) >= self.run.spec.quorum else eligible, due)

    async def _do(self, step: Step) -> None:
        match step:
            case decisions.Wait(what):
                await self._wait(what)
            case decisions.Agree():
                await self._agree()
            case recovery.Seek(version):
                self._watch.open_phase()
                await self._chronicle.record(run_events.VersionSought(version))
            case recovery.KeepOwn():
                own = run_events.Holding(self.run.round, self.run.head)
                self._model.learn(own.digest)
                state = retention.state_of(self.run, own, self._around.lane)
                await self._chronicle.record(run_events.VersionRecalled(own, "backup", state))
            case decisions.AskInit(peer):
                self._watch.open_phase()
                await self._chronicle.record(run_events.PeersAsked((peer,)))
            case decisions.AskMore(peers):
                # Not whenever a peer comes back: one that comes and goes would hold up the round.
                if self._view().due:
                    self._watch.open_phase()
                self.questions.take_back_present(self.run, peers)
                await self._chronicle.record(run_events.PeersAsked(peers))
            case decisions.GiveWork(given):
                if self._view().due:
                    self._watch.open_phase()
                await self._chronicle.record(*given)
            case decisions.OpenRound():
                await self._open_round(step)
            case decisions.CloseTraining(contributors):
                await self._chronicle.record(
                    run_events.TrainingClosed(self.run.round, contributors)
                )
            case decisions.Aggregate(contributors):
                await self._aggregate(contributors)
            case decisions.OpenEvaluation(eligible):
                chosen = decisions.selected(self.run, self.run.round, eligible)
                asked = await self.questions.configure(self.run, chosen)
                self._watch.open_phase()
                await self._chronicle.record(run_events.EvaluationOpened(self.run.round, asked))
            case decisions.CloseRound():
                await self._close_round()
            case decisions.EndRun(state, because):
                await self._chronicle.record(run_events.RunEnded(state, because))

    async def _wait(self, what: str) -> None:
        for peer in self.run.pending:
            what = what.replace(peer, self._around.name_of(peer))
        if shortage := self._around.transfer.limits.shortage:
            if not self._told_shortage:
                self._chronicle.say("error", f"no {shortage}: updates wait at the peers")
            what = f"{shortage}, then {what}"
        self._told_shortage = bool(shortage)
        self._chronicle.waits_for(what)
        timed = self.run.state is not RunState.WAITING or bool(self.run.peers)
        ahead = [decisions.deadline_s(self.run) - self._watch.phase_s] if timed else []
        ahead.append(self._patient_until - time.monotonic())
        if self.run.given:
            ahead.append(self.run.spec.deadline_s)
        if shortage:
            ahead.append(_SHORTAGE_AGAIN_S)
        timeout = min((wait_s for wait_s in ahead if wait_s > 0), default=None)
        try:
            # Not wait_for: before Python 3.12 it loses a cancel that comes together with the news.
            async with asyncio.timeout(timeout):
                await self.changed.wait()
        except TimeoutError:
            pass  # the deadline: decide again

    async def _notice_losses(self) -> None:
        if time.monotonic() < self._patient_until:
            return
        eligible = self._around.eligible()
        at_work = {peer for peer, given in self.run.given.items() if not given.lost}
        lost = sorted((at_work | set(self.run.pending)) - eligible)
        for peer in lost:
            self.session_opened(peer)  # take back what it was sent
            self._chronicle.say(
                "warning", f"{self._around.name_of(peer)} went away in its work", peer
            )
        await self._chronicle.record(*(run_events.PeerLost(peer, "went away") for peer in lost))

    async def _collect(self) -> None:
        """Judge the answers that are there, and write down what becomes of each."""
        answers = await self.questions.answers()
        # At the same time: to measure large updates takes as long as to receive them.
        news = await asyncio.gather(*(self._judged(asked, reply) for _, asked, reply in answers))
        await self._chronicle.record(*news)
        self._around.lane.recorded(self.run.head)  # first weights, or a version from a peer
        if self.run.buffered:
            self._sweep({asked.peer for _, asked, _ in answers})
        self.questions.settle([question for question, _, _ in answers], True)

    async def _judged(self, asked: Asked, reply: Message) -> Fact:
        try:
            return await judge(self.run, self._around, self._model, asked, reply)
        except UpdateRefused as err:
            text, seconds = err.message[:400], asked.seconds
            return run_events.UpdateRefused(
                asked.round, asked.peer, err.reason, text, asked.kind, seconds
            )

    def _sweep(self, peers: set[str]) -> None:
        """Drop the uploads of these peers, who have none under way, that count for nothing."""
        for peer in peers - self.run.given.keys():
            counted = {a.update.digest for a in self.run.buffer if a.peer == peer}
            self._around.lane.uploads.keep_only(peer, counted)

    async def _agree(self) -> None:
        found = schema_agreement.agree(self.run, self._model.schema)
        await self._chronicle.record(*found.facts)
        for peer, words in found.notes:
            name = f"{self._around.name_of(peer)}: " if peer else ""
            self._chronicle.say("warning", f"{name}{words}", peer)

    # --- rounds ---

    async def _open_round(self, step: decisions.OpenRound) -> None:
        if not self._told_memory:  # the first of this life: it is known now who is here
            self._told_memory = True
            self._chronicle.memory_bytes, warning = memory_estimate.told(
                self._recipe, self.run.spec, self._model.schema, len(step.eligible)
            )
            if warning:
                self._chronicle.say("warning", warning)
        self._watch.open_round()
        transfer = self._around.transfer
        self._bytes_at_open = (transfer.bytes_up, transfer.bytes_down)
        asked: tuple[str, ...] = ()
        if not self.run.buffered:  # there each peer has work of its own
            chosen = decisions.selected(self.run, step.round, step.eligible)
            asked = await self.questions.configure(self.run, chosen, opening=step.round)
        failpoint("round.configured")
        await self._chronicle.record(
            run_events.RoundOpened(step.round, step.base, asked, len(step.eligible))
        )

    async def _aggregate(self, contributors: tuple[str, ...]) -> None:
        run, lane = self.run, self._around.lane
        made = await asyncio.to_thread(
            aggregation.commit, run, lane, self._states, self._strategy, contributors
        )
        await self._chronicle.record(
            run_events.VersionCommitted(
                run.round, made.digest, run.head, contributors, made.metrics, made.state
            )
        )
        lane.recorded(made.digest)
        if run.buffered:
            self._sweep({accepted.peer for accepted in run.buffer})
        elif run.spec.late == "fold":
            lane.uploads.clear(keep_of=self.questions.trained_on(self.run).keys())
        else:
            lane.uploads.clear()
        await asyncio.to_thread(self._model.make_patch, run.head, made.digest)
        self.questions.forget_work()

    async def _close_round(self) -> None:
        run, transfer = self.run, self._around.transfer
        found = aggregation.evaluation(run, self._strategy)
        fact = run_events.RoundClosed(
            run.round,
            found.metrics,
            self._watch.round_s,
            transfer.bytes_up - self._bytes_at_open[0],
            transfer.bytes_down - self._bytes_at_open[1],
            self._watch.spent(),
            found.tallies,
        )
        self.questions.forget_work()
        # What is still under way from the round before is late by more than a round.
        if run.buffered:
            self.questions.take_back_evaluations()
        else:
            self.questions.take_back_older(run)
        await self._chronicle.record(fact)
        self._around.publish(round_body(self.run.id, self.run.history[-1]))
        self._retention.prune(self.run, self.questions.trained_on(self.run).values())
