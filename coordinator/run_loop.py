"""Drives one run: does what `runs.decide` says, and writes down what came of it.

The loop waits on one event: replies that arrived, peers that came or went, a stop. Facts are in the
ledger before anything is sent because of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy

from coordinator import closing, gate, runs, strategies
from coordinator.bodies import round_body, run_body
from coordinator.lane import Lane
from coordinator.ledger import Ledger
from coordinator.records import LaneGrid, VersionRecord, one_config, read_claim
from coordinator.runs import Fact, Run, Step, Update, View
from coordinator.strategies import memory
from coordinator.strategies.state import States
from protocols import codecs, messages, weights
from protocols.errors import BadMessage, CommonweightError, DiskFull, HomeFault, UpdateRefused
from protocols.failpoints import failpoint
from protocols.messages import CoordinatorBody, Happened, Sign, Verify, Work, printable
from protocols.room import is_full
from protocols.states import RunState
from protocols.stored import Stored
from protocols.weights import Schema

log = logging.getLogger("commonweight.run")

#: Room for headers and codecs on top of the model's size.
_SLACK_BYTES = 1024 * 1024
#: Flower's code for an exception in a ClientApp; agents use it for every failure of theirs.
_AGENT_FAILED = 2
#: How long peers that were at work may take to come back after the coordinator's restart.
RETURN_WITHIN_S = 20.0
#: First weights have no base to be measured by.
_FIRST_WEIGHTS_BYTES = 8 * 1024**3
#: While the disk is full: how often to look, and after how many looks to try all the same.
_LOOK_FOR_ROOM_S = 1.0
_TRIES_WITHOUT_ROOM = 30
_SHORTAGE_AGAIN_S = 5.0


class Fleetwork(NamedTuple):
    """What a run needs of the coordinator around it."""

    ledger: Ledger
    lane: Lane
    grid: LaneGrid
    sign: Sign
    verify: Verify
    eligible: Callable[[], frozenset[str]]
    node_of: Callable[[str], int | None]
    peer_of: Callable[[int], str]
    name_of: Callable[[str], str]
    ring: Callable[[Sequence[str]], None]
    publish: Callable[[CoordinatorBody], None]
    #: Refused updates by reason, since the coordinator started.
    refused: Counter[str]


class Asked(NamedTuple):
    """A question that is under way: to whom, and which."""

    peer: str
    round: int
    kind: str


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
        self._codec = codecs.find(run.spec.codec)
        #: The version that has a patch, its parent, and the patch's bytes. After a restart: none.
        self._patch = ("", "", 0)
        self._outstanding: dict[str, Asked] = {}
        #: Answers to questions that were about to be taken back.
        self._arrived: list[Message] = []
        self._settling: dict[str, asyncio.Future[bool]] = {}
        self._content: RecordDict | None = None
        self._schema: Schema = {}
        self._model_bytes = 0
        self._elsewhere = elsewhere
        # After a restart nobody has come back yet: that is no reason to call them lost.
        self._patient_until = time.monotonic() + RETURN_WITHIN_S if run.pending else 0.0
        self._on_disk = {closed.digest for closed in run.history}
        self._opened_at = self._phase_at = time.monotonic()
        self._marks: dict[str, float] = {}
        self._bytes_at_open = (0, 0)
        self._waiting_for = ""
        self._stop_reason = ""
        self._stands_still = self._told_shortage = False

    # --- from outside ---

    def stop(self, because: str) -> None:
        """End the run at the next step; what is committed stays."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        stale = {mid for mid, asked in self._outstanding.items() if asked.peer == peer}
        self._take_back(stale)
        self.changed.set()

    def settling(self, question: str) -> asyncio.Future[bool]:
        """Done when the answer to a question is in the ledger (True) or never will be (False)."""
        known = question in self._outstanding
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not known:
            found.set_result(False)
        return self._settling.setdefault(question, found) if known else found

    def ring_again(self) -> None:
        """Doorbells were lost with the broker: ring at every peer whose answer is awaited."""
        self._around.ring(sorted({asked.peer for asked in self._outstanding.values()}))

    @property
    def waiting_for(self) -> str:
        return self._waiting_for

    # --- the loop ---

    async def drive(self) -> Run:
        """Work until the run has ended. Raises what the ledger or the disk raises."""
        if self.run.head:
            await self._find_whole_version()
        if self.run.head and not self.run.ended:
            await self._learn_model()
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
        self._take_back(set(self._outstanding))
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
                await self._record(runs.VersionLost(run.head, digest))
                text = f"{lost}: run {run.id} goes on from {digest[:12]}"
                self._say("warning", text, run.id)
                return
        await self._record(runs.RunEnded(RunState.FAILED, f"{lost}, and no earlier one is whole"))

    async def _turn(self) -> None:
        """Do what there is to do now. What a full disk interrupts can be done again."""
        await self._collect()
        await self._notice_losses()
        await self._ask_pending()
        if self._stop_reason:
            await self._record(runs.RunEnded(RunState.STOPPED, self._stop_reason))
            return
        step = runs.decide(self.run, self._view())
        try:
            await self._do(step)
        except (DiskFull, HomeFault):  # the disk's fault and not the run's: it goes on later
            raise
        except CommonweightError as err:
            log.error("run %s failed: %s", self.run.id, err.message)
            await self._record(runs.RunEnded(RunState.FAILED, err.message))

    def _view(self) -> View:
        due = time.monotonic() - self._phase_at >= self.run.spec.deadline_s
        return View(self._around.eligible(), due)

    async def _do(self, step: Step) -> None:
        match step:
            case runs.Wait(what):
                await self._wait(what)
            case runs.AskInit(peer):
                self._phase_at = time.monotonic()
                await self._record(runs.PeersAsked((peer,)))
            case runs.AskMore(peers):
                # Not whenever a peer comes back: one that comes and goes would hold up the round.
                if self._view().due:
                    self._phase_at = time.monotonic()
                present = (self.run.round, self.run.kind)
                found = self._outstanding.items()
                self._take_back({q for q, a in found if a.peer in peers and a[1:] == present})
                await self._record(runs.PeersAsked(peers))
            case runs.OpenRound():
                await self._open_round(step)
            case runs.CloseTraining(contributors):
                await self._record(runs.TrainingClosed(self.run.round, contributors))
            case runs.Aggregate(contributors):
                await self._aggregate(contributors)
            case runs.OpenEvaluation(eligible):
                asked = await self._configure(eligible)
                self._phase_at = time.monotonic()
                await self._record(runs.EvaluationOpened(self.run.round, asked))
            case runs.CloseRound():
                await self._close_round()
            case runs.EndRun(state, because):
                await self._record(runs.RunEnded(state, because))

    async def _wait(self, what: str) -> None:
        if shortage := self._around.lane.shortage:
            if not self._told_shortage:
                self._say("error", f"no {shortage}: updates wait at the peers", self.run.id)
            what = f"{shortage}, then {what}"
        self._told_shortage = bool(shortage)
        if what != self._waiting_for:
            self._waiting_for = what
            self._announce()
        left = self.run.spec.deadline_s - (time.monotonic() - self._phase_at)
        timed = self.run.state is not RunState.WAITING or bool(self.run.peers)
        ahead = [left] if timed else []
        ahead.append(self._patient_until - time.monotonic())
        if shortage:
            ahead.append(_SHORTAGE_AGAIN_S)
        timeout = min((wait_s for wait_s in ahead if wait_s > 0), default=None)
        try:
            # Not wait_for: before Python 3.12 it loses a cancel that comes together with the news.
            async with asyncio.timeout(timeout):
                await self.changed.wait()
        except TimeoutError:
            pass  # the deadline: decide again

    # --- asking ---

    async def _open_round(self, step: runs.OpenRound) -> None:
        if self._memory_bytes is None:  # the first of this life: it is known now who is here
            peers = len(step.eligible)
            self._memory_bytes, warning = memory.told(
                self._recipe, self.run.spec, self._schema, peers
            )
            if warning:
                self._say("warning", warning, self.run.id)
        self._opened_at = self._phase_at = time.monotonic()
        self._marks = {}
        lane = self._around.lane
        self._bytes_at_open = (lane.bytes_up, lane.bytes_down)
        asked = await self._configure(step.eligible, opening=step.round)
        failpoint("round.configured")
        await self._record(runs.RoundOpened(step.round, step.base, asked))

    async def _configure(self, eligible: Sequence[str], opening: int = 0) -> tuple[str, ...]:
        """Let the strategy choose among `eligible` and say what they get; the chosen peers."""
        around = self._around
        around.grid.eligible = {n for p in eligible if (n := around.node_of(p)) is not None}
        kind = "train" if opening or self.run.state is RunState.TRAINING else "evaluate"
        number = opening or self.run.round
        model = None
        if self._recipe.looks_at_weights:
            model = weights.load(around.lane.version(self.run.head))
        arrays = VersionRecord(self.run.head, model)
        configure = getattr(self._strategy, f"configure_{kind}")
        chosen = list(
            await asyncio.to_thread(configure, number, arrays, ConfigRecord(), around.grid)
        )
        self._content = None
        if chosen:
            config = self._work_record(kind, number, one_config(chosen))
            self._content = RecordDict({"arrays": VersionRecord(self.run.head), "config": config})
        return tuple(sorted(around.peer_of(m.metadata.dst_node_id) for m in chosen))

    def _work_record(
        self, kind: Any, number: int, extra: Mapping[str, int | float] = MappingProxyType({})
    ) -> ConfigRecord:
        """The signed work. `extra`: what the strategy tells the task, over the run's settings."""
        spec = self.run.spec
        patched, parent, patch_bytes = self._patch
        work = Work(
            run=self.run.id,
            round=number,
            kind=kind,
            task=spec.task,
            base=self.run.head,
            nbytes=self._model_bytes,
            parent=parent if patched == self.run.head else "",
            patch_bytes=patch_bytes if patched == self.run.head else 0,
            codec=spec.codec,
            seed=spec.seed,
            settings={**spec.settings, **extra},
            deadline_s=spec.deadline_s,
        )
        payload, signature = messages.sign_work(work, self._around.sign)
        return ConfigRecord({"work": payload, "signature": signature})

    async def _ask_pending(self) -> None:
        """Send the open question to every pending peer that has it not yet."""
        kind = self.run.kind
        question = (self.run.round, kind)
        reached = {asked.peer for asked in self._outstanding.values() if asked[1:] == question}
        eligible = self._around.eligible()
        peers = [p for p in self.run.pending if p not in reached and p in eligible]
        if not peers:
            return
        if kind == "init":
            self._around.lane.limit_bytes = _FIRST_WEIGHTS_BYTES
            self._around.lane.version_bytes = 0
            content = RecordDict({"config": self._work_record("init", 0)})
        else:
            if self._content is None:  # after a restart
                await self._configure(sorted(eligible))
            if self._content is None:
                return
            content = self._content
        message_type = "query.init" if kind == "init" else kind
        outgoing: list[Message] = []
        for peer in peers:
            if (node := self._around.node_of(peer)) is not None:
                outgoing.append(Message(content, node, message_type, group_id=self.run.id))
        failpoint("work.pushing")
        sent = await asyncio.to_thread(self._around.grid.push_messages, outgoing)
        failpoint("work.pushed")
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in outgoing}
        reached_now = {mid: self._around.peer_of(nodes[mid]) for mid in sent}
        self._outstanding |= {mid: Asked(peer, *question) for mid, peer in reached_now.items()}
        self._around.ring(list(reached_now.values()))

    async def _notice_losses(self) -> None:
        if time.monotonic() < self._patient_until:
            return
        eligible = self._around.eligible()
        lost = [peer for peer in self.run.pending if peer not in eligible]
        for peer in lost:
            self.session_opened(peer)  # take back what it was sent
            self._say("warning", f"{self._around.name_of(peer)} went away in its work", peer)
        await self._record(*(runs.PeerLost(peer, "went away") for peer in lost))

    def _take_back(self, questions: set[str]) -> None:
        """Forget questions, but for those that are answered: the ledger is to hear of each."""
        if not questions:
            return
        found = self._around.grid.pull_messages(questions)
        # Flower's own errors, of nodes that are gone, are nobody's answers.
        self._arrived += [m for m in found if not m.has_error() or m.error.code == _AGENT_FAILED]
        questions -= {reply.metadata.reply_to_message_id for reply in self._arrived}
        self._around.grid.forget(questions)
        for question in questions:
            del self._outstanding[question]
        self._settle(questions, False)

    def _settle(self, questions: Iterable[str], settled: bool) -> None:
        for question in questions:
            waiting = self._settling.pop(question, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(settled)

    # --- answers ---

    async def _collect(self) -> None:
        if not self._outstanding:
            return
        pulled = await asyncio.to_thread(self._around.grid.pull_messages, set(self._outstanding))
        replies = {m.metadata.reply_to_message_id: m for m in (*self._arrived, *pulled)}
        self._arrived = []
        if not replies:
            return
        failpoint("reply.pulled")
        # All at once: a session that opens meanwhile must not take back what is answered.
        asked_of = {q: asked for q in replies if (asked := self._outstanding.pop(q, None))}
        facts: list[Fact] = []
        for question, asked in asked_of.items():
            peer, reply = asked.peer, replies[question]
            try:
                facts.append(await self._judge(peer, reply))
            except UpdateRefused as err:
                facts.append(
                    runs.UpdateRefused(asked.round, peer, err.reason, err.message[:400], asked.kind)
                )
                self._around.refused[err.reason] += 1
                name = self._around.name_of(peer)
                self._say("warning", f"refused {name}: {err.reason}: {err.message}", peer)
        await self._record(*facts)
        self._settle(asked_of, True)

    async def _judge(self, peer: str, reply: Message) -> Fact:
        """The fact that a reply amounts to. Raises UpdateRefused."""
        if reply.has_error():
            # Flower's own words: the node is gone. From a peer that is there they are a lie, and
            # to believe it would be to ask again, and again.
            if reply.error.code != _AGENT_FAILED and peer not in self._around.eligible():
                return runs.PeerLost(peer, "went away")
            raise UpdateRefused("agent failed", printable(reply.error.reason or "no reason given"))
        try:
            claim, payload, signature = read_claim(reply)
        except (BadMessage, KeyError, TypeError, ValueError) as err:
            raise UpdateRefused("bad claim", str(err)) from err
        expected = gate.expectation(self.run, self._schema)
        gate.check_claim(self.run, expected, peer, claim, payload, signature, self._around.verify)
        lane = self._around.lane
        norm = 0.0
        if expected.kind != "evaluate":
            norm = await asyncio.to_thread(self._measure, expected, peer, claim.digest)
            if expected.kind == "init":
                lane.adopt(peer, claim.digest)
                await self._learn_model(claim.digest)
                return runs.WeightsInitialised(claim.digest, peer)
        return runs.UpdateAccepted(
            self.run.round,
            peer,
            Update(
                digest=claim.digest,
                nbytes=claim.nbytes,
                num_examples=claim.num_examples,
                metrics=claim.metrics,
                norm=norm,
            ),
        )

    def _measure(self, expected: gate.Expected, peer: str, digest: str) -> float:
        """How far an upload is from its base, if it passes the gate. Raises UpdateRefused."""
        lane = self._around.lane
        with contextlib.ExitStack() as stack:

            def uploaded() -> Stored:
                return stack.enter_context(lane.open_update(peer, digest))

            if expected.kind == "init":
                gate.check_weights(expected, uploaded)
                return 0.0
            base = stack.enter_context(Stored(lane.version(expected.base)))
            update = gate.check_weights(
                expected, lambda: codecs.decoded(self._codec, uploaded(), base)
            )
            return gate.distance(update, base)

    async def _learn_model(self, digest: str = "") -> None:
        path = self._around.lane.version(digest or self.run.head)
        with Stored(path) as model:
            self._schema, self._model_bytes = model.schema, model.nbytes
        self._around.lane.version_bytes = self._model_bytes
        most = codecs.most_bytes(self._codec, self._schema, self._model_bytes)
        self._around.lane.limit_bytes = min(most, self._model_bytes) + _SLACK_BYTES

    # --- closing ---

    async def _aggregate(self, contributors: tuple[str, ...]) -> None:
        run = self.run
        made = await asyncio.to_thread(
            closing.commit, run, self._around.lane, self._states, self._strategy, contributors
        )
        await self._record(
            runs.VersionCommitted(
                run.round, made.digest, run.head, contributors, made.metrics, made.state
            )
        )
        self._around.lane.drop_updates()
        size = await asyncio.to_thread(self._around.lane.make_patch, run.head, made.digest)
        self._patch = (made.digest, run.head, size)
        self._content = None

    async def _close_round(self) -> None:
        run, lane = self.run, self._around.lane
        metrics = closing.evaluation(run, self._strategy)
        fact = runs.RoundClosed(
            run.round,
            metrics,
            time.monotonic() - self._opened_at,
            lane.bytes_up - self._bytes_at_open[0],
            lane.bytes_down - self._bytes_at_open[1],
            self._spent(),
        )
        self._content = None
        # What is still under way from the round before is late by more than a round.
        old = {mid for mid, asked in self._outstanding.items() if asked.round < run.round}
        self._take_back(old)
        await self._record(fact)
        self._publish_round()
        self._prune()

    def _spent(self) -> dict[str, float]:
        """Seconds by part of the round that closes now; nothing for one that a restart cut."""
        names = ("UpdateAccepted", "TrainingClosed", "VersionCommitted")
        marks = [self._marks[name] for name in names if name in self._marks]
        if len(marks) < len(names):
            return {}
        edges = [self._opened_at, *marks, time.monotonic()]
        parts = ("work", "wait", "aggregate", "evaluate")
        return {part: max(0.0, b - a) for part, (a, b) in zip(parts, pairwise(edges), strict=True)}

    def _publish_round(self) -> None:
        closed = self.run.history[-1]
        self._around.publish(round_body(self.run.id, closed))

    def _prune(self) -> None:
        """Keep the last two versions and the best; the ledger still names the others."""
        run, lane = self.run, self._around.lane
        keep = {run.head, run.parent, run.best.digest if run.best else ""}
        self._on_disk |= {run.head, run.parent}
        for digest in self._on_disk - keep - self._elsewhere:
            lane.drop(digest)
        still = {d for r in run.history if r.digest in keep for d in r.strategy_state.values()}
        known = {d for r in run.history for d in r.strategy_state.values()}
        self._states.drop(known - still - self._elsewhere)
        failpoint("round.pruned")
        self._on_disk &= keep

    # --- writing down and telling ---

    async def _record(self, *facts: Fact) -> None:
        """Write facts down, and act on none of them before: a full disk holds up the run here."""
        if not facts:
            return
        failpoint("run.recording", type(facts[0]).__name__)
        for fact in facts:
            self._marks.setdefault(type(fact).__name__, time.monotonic())
        bodies = [runs.encode_fact(fact) for fact in facts]
        while True:
            try:
                self._around.ledger.append(self.run.id, bodies)
                break
            except DiskFull as err:
                await self._wait_for_room(err)
        failpoint("run.recorded", type(facts[-1]).__name__)
        for fact in facts:
            self.run = runs.apply(self.run, fact)
        if self._stands_still:
            self._stands_still, self._waiting_for = False, ""
            self._say("info", f"there is room again: run {self.run.id} goes on", self.run.id)
        self._announce()

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
        self._around.publish(run_body(self.run, self._waiting_for, self._memory_bytes or 0))

    def _say(self, level: Any, text: str, subject: str) -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        self._around.publish(Happened(level=level, text=printable(text), subject=subject))
