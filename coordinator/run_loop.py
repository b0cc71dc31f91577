"""Drives one run: does what `decisions.decide` says, and writes down what came of it.

The loop waits on one event: replies that arrived, peers that came or went, a stop. Facts are in the
ledger before anything is sent because of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from coordinator import (
    agreement,
    closing,
    decisions,
    facts,
    recall,
    retention,
    strategies,
    transitions,
)
from coordinator.asking import Asked, Questions
from coordinator.bodies import round_body, run_body
from coordinator.decisions import Step, View
from coordinator.facts import Fact
from coordinator.fleetwork import Fleetwork
from coordinator.judging import judge
from coordinator.lane import MOST_UPLOADS
from coordinator.model import Model
from coordinator.retention import Retention
from coordinator.runs import Run
from coordinator.strategies import memory
from coordinator.strategies.state import States
from coordinator.timing import Stopwatch
from protocols import codecs
from protocols.errors import TELLABLE, CommonweightError, DiskFull, HomeFault, UpdateRefused
from protocols.failpoints import failpoint
from protocols.messages import Happened, printable
from protocols.room import is_full
from protocols.states import RunState

log = logging.getLogger("commonweight.run")

#: How long peers that were at work may take to come back after the coordinator's restart.
RETURN_WITHIN_S = 20.0
#: While the disk is full: how often to look, and after how many looks to try all the same.
_LOOK_FOR_ROOM_S = 1.0
_TRIES_WITHOUT_ROOM = 30
_SHORTAGE_AGAIN_S = 5.0
_ANNOUNCE_EVERY_S = 0.1


class RunLoop:
    """One run in work. `changed` is set by whoever has news for it, in the loop's thread.

    `elsewhere`: versions that other runs still need.
    """

    def __init__(
        self, run: Run, around: Fleetwork, elsewhere: frozenset[str] = frozenset()
    ) -> None:
        self.run = run
        self.changed = asyncio.Event()
        self._around = around
        self._recipe = strategies.find(run.spec.strategy)
        self._strategy: Strategy = self._recipe.make(run.spec.strategy_args)
        self._states = States(around.lane.states)
        self._memory_bytes: int | None = None
        self._model = Model(around.lane, codecs.find(run.spec.codec))
        folds = run.spec.late == "fold"
        around.lane.most_uploads = MOST_UPLOADS + run.spec.buffer + folds
        self.questions = Questions(around, self._recipe, self._strategy, self._model)
        #: Peers whose data or model do not fit the run; asked again after they came back.
        self._misfits: set[str] = set()
        self._retention = Retention(run, around.lane, self._states, elsewhere)
        # After a restart nobody has come back yet: that is no reason to call them lost.
        self._patient_until = (
            time.monotonic() + RETURN_WITHIN_S if run.pending or run.given else 0.0
        )
        self._watch = Stopwatch()
        self._bytes_at_open = (0, 0)
        self._waiting_for = ""
        self._announced_at = -math.inf
        self._announcing: asyncio.TimerHandle | None = None
        self._stop_reason = ""
        self._stands_still = self._told_shortage = False

    # --- from outside ---

    def stop(self, because: str) -> None:
        """End the run at the next step; what is committed stays."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        self._misfits.discard(peer)
        self.questions.take_back_from(peer)
        self.changed.set()

    @property
    def waiting_for(self) -> str:
        return self._waiting_for

    # --- the loop ---

    async def drive(self) -> Run:
        """Work until the run has ended. Raises what the ledger or the disk raises."""
        try:
            return await self._driven()
        finally:
            self._announce_now()

    async def _driven(self) -> Run:
        if self.run.head and not self.run.recalling:
            await self._find_whole_version()
        if self.run.head and not (self.run.ended or self.run.recalling):
            self._model.learn(self.run.head)
        self._announce()
        goes_on = f"goes on in round {self.run.round}" if self.run.round else "started"
        self._say("info", f"run {self.run.id} {goes_on}", self.run.id)
        while not self.run.ended:
            self.changed.clear()
            try:
                await self._turn()
            except (OSError, DiskFull) as err:
                if not is_full(err):
                    raise
                await self._wait_for_room(err)  # nothing was decided: the same again
        self.questions.take_back_all()
        await self._collect()
        text = f"run {self.run.id} {self.run.state}: {self.run.ended_because}"
        self._say("error" if self.run.state is RunState.FAILED else "info", text, self.run.id)
        return self.run

    async def _find_whole_version(self) -> None:
        """Go back to the newest version that is not damaged on disk; end if there is none."""
        run, is_whole = self.run, self._around.lane.is_whole
        if await asyncio.to_thread(is_whole, run.head):
            return
        lost = f"version {run.head[:12]} is damaged on disk"
        earlier = [*(closed.digest for closed in reversed(run.history)), run.first]
        for digest in earlier:
            if digest != run.head and await asyncio.to_thread(is_whole, digest):
                await self._record(facts.VersionLost(run.head, digest))
                text = f"{lost}: run {run.id} goes on from {digest[:12]}"
                self._say("warning", text, run.id)
                return
        await self._record(facts.RunEnded(RunState.FAILED, f"{lost}, and no earlier one is whole"))

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
            await self._record(facts.RunEnded(RunState.STOPPED, self._stop_reason))
            return
        step = decisions.decide(self.run, self._view())
        try:
            await self._do(step)
        except (DiskFull, HomeFault):  # the disk's fault and not the run's: it goes on later
            raise
        except CommonweightError as err:
            log.error("run %s failed: %s", self.run.id, err.message)
            await self._record(facts.RunEnded(RunState.FAILED, err.message))

    def _view(self) -> View:
        due = self._watch.phase_s >= decisions.deadline_s(self.run)
        eligible = self._around.eligible() - self._misfits
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
            case recall.Seek(version):
                self._watch.open_phase()
                await self._record(facts.VersionSought(version))
            case recall.KeepOwn():
                own = facts.Holding(self.run.round, self.run.head)
                self._model.learn(own.digest)
                state = retention.state_of(self.run, own, self._around.lane)
                await self._record(facts.VersionRecalled(own, "backup", state))
            case decisions.AskInit(peer):
                self._watch.open_phase()
                await self._record(facts.PeersAsked((peer,)))
            case decisions.AskMore(peers):
                # Not whenever a peer comes back: one that comes and goes would hold up the round.
                if self._view().due:
                    self._watch.open_phase()
                self.questions.take_back_present(self.run, peers)
                await self._record(facts.PeersAsked(peers))
            case decisions.GiveWork(given):
                if self._view().due:
                    self._watch.open_phase()
                await self._record(*given)
            case decisions.OpenRound():
                await self._open_round(step)
            case decisions.CloseTraining(contributors):
                await self._record(facts.TrainingClosed(self.run.round, contributors))
            case decisions.Aggregate(contributors):
                await self._aggregate(contributors)
            case decisions.OpenEvaluation(eligible):
                chosen = decisions.selected(self.run, self.run.round, eligible)
                asked = await self.questions.configure(self.run, chosen)
                self._watch.open_phase()
                await self._record(facts.EvaluationOpened(self.run.round, asked))
            case decisions.CloseRound():
                await self._close_round()
            case decisions.EndRun(state, because):
                await self._record(facts.RunEnded(state, because))

    async def _wait(self, what: str) -> None:
        for peer in self.run.pending:
            what = what.replace(peer, self._around.name_of(peer))
        if shortage := self._around.lane.shortage:
            if not self._told_shortage:
                self._say("error", f"no {shortage}: updates wait at the peers", self.run.id)
            what = f"{shortage}, then {what}"
        self._told_shortage = bool(shortage)
        if what != self._waiting_for:
            self._waiting_for = what
            self._announce()
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
            self._say("warning", f"{self._around.name_of(peer)} went away in its work", peer)
        await self._record(*(facts.PeerLost(peer, "went away") for peer in lost))

    async def _collect(self) -> None:
        """Judge the answers that are there, and write down what becomes of each."""
        answers = await self.questions.answers()
        # At the same time: to measure large updates takes as long as to receive them.
        news = await asyncio.gather(*(self._judged(asked, reply) for _, asked, reply in answers))
        await self._record(*news)
        if self.run.buffered:
            self._sweep({asked.peer for _, asked, _ in answers})
        self.questions.settle([question for question, _, _ in answers], True)

    async def _judged(self, asked: Asked, reply: Message) -> Fact:
        try:
            return await judge(self.run, self._around, self._model, asked, reply)
        except UpdateRefused as err:
            text, seconds = err.message[:400], asked.seconds
            return facts.UpdateRefused(
                asked.round, asked.peer, err.reason, text, asked.kind, seconds
            )

    def _sweep(self, peers: set[str]) -> None:
        """Drop the uploads of these peers, who have none under way, that count for nothing."""
        for peer in peers - self.run.given.keys():
            counted = {a.update.digest for a in self.run.buffer if a.peer == peer}
            self._around.lane.keep_updates(peer, counted)

    async def _agree(self) -> None:
        found = agreement.agree(self.run, self._model.schema)
        await self._record(*found.facts)
        for peer, words in found.notes:
            name = f"{self._around.name_of(peer)}: " if peer else ""
            self._say("warning", f"{name}{words}", peer or self.run.id)

    # --- rounds ---

    async def _open_round(self, step: decisions.OpenRound) -> None:
        if self._memory_bytes is None:  # the first of this life: it is known now who is here
            peers = len(step.eligible)
            self._memory_bytes, warning = memory.told(
                self._recipe, self.run.spec, self._model.schema, peers
            )
            if warning:
                self._say("warning", warning, self.run.id)
        self._watch.open_round()
        lane = self._around.lane
        self._bytes_at_open = (lane.bytes_up, lane.bytes_down)
        asked: tuple[str, ...] = ()
        if not self.run.buffered:  # there each peer has work of its own
            chosen = decisions.selected(self.run, step.round, step.eligible)
            asked = await self.questions.configure(self.run, chosen, opening=step.round)
        failpoint("round.configured")
        await self._record(facts.RoundOpened(step.round, step.base, asked, len(step.eligible)))

    async def _aggregate(self, contributors: tuple[str, ...]) -> None:
        run, lane = self.run, self._around.lane
        made = await asyncio.to_thread(
            closing.commit, run, lane, self._states, self._strategy, contributors
        )
        await self._record(
            facts.VersionCommitted(
                run.round, made.digest, run.head, contributors, made.metrics, made.state
            )
        )
        if run.buffered:
            self._sweep({accepted.peer for accepted in run.buffer})
        elif run.spec.late == "fold":
            lane.drop_updates(but_of=self.questions.trained_on(self.run).keys())
        else:
            lane.drop_updates()
        await asyncio.to_thread(self._model.make_patch, run.head, made.digest)
        self.questions.forget_work()

    async def _close_round(self) -> None:
        run, lane = self.run, self._around.lane
        found = closing.evaluation(run, self._strategy)
        fact = facts.RoundClosed(
            run.round,
            found.metrics,
            self._watch.round_s,
            lane.bytes_up - self._bytes_at_open[0],
            lane.bytes_down - self._bytes_at_open[1],
            self._watch.spent(),
            found.tallies,
        )
        self.questions.forget_work()
        # What is still under way from the round before is late by more than a round.
        if run.buffered:
            self.questions.take_back_evaluations()
        else:
            self.questions.take_back_older(run)
        await self._record(fact)
        self._around.publish(round_body(self.run.id, self.run.history[-1]))
        self._retention.prune(self.run, self.questions.trained_on(self.run).values())

    # --- writing down and telling ---

    async def _record(self, *news: Fact) -> None:
        """Write facts down, and act on none of them before: a full disk holds up the run here."""
        if not news:
            return
        failpoint("run.recording", type(news[0]).__name__)
        for fact in news:
            self._watch.mark(fact)
        bodies = [facts.encode(fact) for fact in news]
        while True:
            try:
                self._around.ledger.append(self.run.id, bodies)
                break
            except DiskFull as err:
                await self._wait_for_room(err)
        failpoint("run.recorded", type(news[-1]).__name__)
        for fact in news:
            self.run = transitions.apply(self.run, fact)
            if isinstance(fact, facts.UpdateRefused):
                self._tell_refusal(fact)
        if self._stands_still:
            self._stands_still, self._waiting_for = False, ""
            self._say("info", f"there is room again: run {self.run.id} goes on", self.run.id)
        self._announce()

    def _tell_refusal(self, fact: facts.UpdateRefused) -> None:
        if fact.reason in TELLABLE:
            self._misfits.add(fact.peer)
        self._around.refused[fact.reason] += 1
        name = self._around.name_of(fact.peer)
        self._say("warning", f"refused {name}: {fact.reason}: {fact.detail}", fact.peer)

    async def _wait_for_room(self, err: Exception) -> None:
        """The disk is full: stand still, say so, and come back when there is room."""
        lane = self._around.lane
        self._waiting_for = f"room on the coordinator's disk ({lane.free_bytes / 1e6:,.0f} MB free)"
        self._announce()
        if not self._stands_still:
            self._stands_still = True
            self._say("error", f"run {self.run.id} stands still: {err}", self.run.id)
        # Not at once, as little room may be too little; and also without, as a quota shows none.
        for _ in range(_TRIES_WITHOUT_ROOM):
            await asyncio.sleep(_LOOK_FOR_ROOM_S)
            if lane.has_room():
                break

    def _announce(self) -> None:
        """Tell the monitors where the run stands; of what changes faster than that, the last."""
        wait_s = self._announced_at + _ANNOUNCE_EVERY_S - time.monotonic()
        if wait_s <= 0:
            self._announce_now()
        elif self._announcing is None:
            loop = asyncio.get_running_loop()
            self._announcing = loop.call_later(wait_s, self._announce_now)

    def _announce_now(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        self._announced_at = time.monotonic()
        self._around.publish(run_body(self.run, self._waiting_for, self._memory_bytes or 0))

    def _say(self, level: Any, text: str, subject: str) -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        self._around.publish(Happened(level=level, text=printable(text), subject=subject))
