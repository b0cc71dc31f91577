"""Drives one job: does what `dispatch.decide` says, and writes down what came of it.

Beside training: units are Flower messages like a run's questions, and a peer takes one after the
other as they come. Facts are in the ledger before anything is sent because of them. A peer that
comes back after its end, or ours, is asked for its open units again and answers from its outbox.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from flwr.app import ConfigRecord, Message, RecordDict

from coordinator import dispatch, job_facts, jobs
from coordinator.analysis import ask
from coordinator.asking import AGENT_FAILED
from coordinator.bodies import job_body
from coordinator.dispatch import View
from coordinator.fleetwork import Fleetwork
from coordinator.job_facts import Fact, Given, JobState
from coordinator.job_lane import JobLane
from coordinator.jobs import FAILED, Job, Unit
from protocols import jobs as wire
from protocols.errors import BadMessage, DiskFull
from protocols.failpoints import failpoint
from protocols.jobs import Analyze, Answer, Private
from protocols.messages import Happened, printable
from protocols.room import is_full

log = logging.getLogger("commonweight.job")

ANSWER = "cw.answer"
#: How long peers that were at work may take to come back, after a restart or a lost link.
RETURN_WITHIN_S = 20.0
_AGAIN_S = 1.0


class Asked(NamedTuple):
    """A question under way: which unit, to whom, its key, and since when (monotonic s)."""

    unit: int
    peer: str
    key: str
    at: float


class JobLoop:
    """One job in work. `changed` is set by whoever has news for it, in the loop's thread."""

    def __init__(self, job: Job, around: Fleetwork, lane: JobLane) -> None:
        self.job = job
        self.changed = asyncio.Event()
        self._around, self._lane = around, lane
        self._under_way: dict[str, Asked] = {}
        self._settling: dict[str, asyncio.Future[bool]] = {}
        now = time.monotonic()
        self._patient_until = now + RETURN_WITHIN_S if any(job.leases()) else 0.0
        self._ends_at = now + job.spec.deadline_s if job.spec.deadline_s else float("inf")
        #: By lease: when it is overdue (monotonic s); it begins anew in each life.
        self._due: dict[tuple[int, str], float] = {}
        #: The digest of what peers fetch, by unit.
        self._cut: dict[int, str] = {}
        self._stop_reason = ""

    # --- from outside ---

    def stop(self, because: str) -> None:
        """End the job at the next step; what is verified stays."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        self._forget({q for q, asked in self._under_way.items() if asked.peer == peer})
        self.changed.set()

    def settling(self, question: str) -> asyncio.Future[bool] | None:
        """Done when the answer to a question of this job is in the ledger, or never will be."""
        if question not in self._under_way:
            return None
        return self._settling.setdefault(question, asyncio.get_running_loop().create_future())

    # --- the loop ---

    async def drive(self) -> Job:
        """Work until the job has ended. Raises what the ledger raises."""
        self._say("info", f"job {self.job.id} {'goes on' if self.job.units else 'started'}")
        while not self.job.ended:
            self.changed.clear()
            try:
                settled = await self._collect()
                await self._verify()
                await self._turn()
                self._settle(settled, True)
                await self._wait()
            except (OSError, DiskFull) as err:
                if not is_full(err):
                    raise
                await asyncio.sleep(_AGAIN_S)  # nothing was decided: the same again
        self._forget(set(self._under_way))
        for digest in self._cut.values():
            self._lane.drop(digest)
        level = "error" if self.job.state is JobState.FAILED else "info"
        self._say(level, f"job {self.job.id} {self.job.state}: {self.job.ended_because}")
        return self.job

    async def _turn(self) -> None:
        """Decide until there is only to wait, then ask whoever is to be asked."""
        try:
            await self._dispatch()
        except BadMessage as err:  # what the requester gave is not there any more
            self._record(job_facts.JobEnded(JobState.FAILED, err.message))

    async def _dispatch(self) -> None:
        while not self.job.ended:
            steps = dispatch.decide(self.job, self._view())
            if self._stop_reason:
                steps = [dispatch.End(JobState.STOPPED, self._stop_reason)]
            if not steps:
                break
            self._record(*map(self._fact, steps))
            if any(isinstance(step, dispatch.Lease) for step in steps):
                break  # each free peer has its unit now
        if not self.job.ended:
            await self._ask()

    def _fact(self, step: dispatch.Step) -> Fact:
        match step:
            case dispatch.Lease(unit, peer, first, stop):
                return job_facts.UnitLeased(unit, peer, first, stop)
            case dispatch.EndLease(unit, peer, reason):
                return job_facts.LeaseEnded(unit, peer, reason)
            case dispatch.End(state, because):
                return job_facts.JobEnded(state, because)

    def _view(self) -> View:
        now, eligible = time.monotonic(), self._around.eligible()
        asked = {(asked.unit, asked.peer) for asked in self._under_way.values()}
        gone = set()
        for unit, peer, lease in self.job.leases():
            wanted = lease == "open" and not unit.verified
            away = peer not in eligible and now >= self._patient_until
            if away or not (wanted or (unit.number, peer) in asked):
                gone.add((unit.number, peer))
        overdue = {lease for lease, due in self._due.items() if now >= due}
        return View(eligible, frozenset(gone), frozenset(overdue), now >= self._ends_at)

    async def _wait(self) -> None:
        if self.job.ended:
            return
        now = time.monotonic()
        open_leases = {(u.number, p) for u, p, lease in self.job.leases() if lease == "open"}
        times = [self._due[lease] for lease in open_leases & self._due.keys()]
        times += [self._patient_until, self._ends_at]
        ahead = min((at - now for at in times if at > now), default=None)
        try:
            async with asyncio.timeout(None if ahead == float("inf") else ahead):
                await self.changed.wait()
        except TimeoutError:
            pass  # something is due: decide again

    # --- asking ---

    async def _ask(self) -> None:
        """Put every open lease to its peer that has no message about it."""
        asked = {(asked.unit, asked.peer) for asked in self._under_way.values()}
        eligible = self._around.eligible()
        outgoing: list[tuple[Asked, Message]] = []
        for unit, peer, lease in self.job.leases():
            node = self._around.node_of(peer)
            wanted = lease == "open" and not unit.verified and peer in eligible
            if not wanted or (unit.number, peer) in asked or node is None:
                continue
            question, key, record = await self._question(unit)
            content = RecordDict({"unit": record})
            message = Message(content, node, f"query.{question}", group_id=self.job.id)
            outgoing.append((Asked(unit.number, peer, key, time.monotonic()), message))
        if not outgoing:
            return
        failpoint("job.pushing")
        sent = set(
            await asyncio.to_thread(self._around.grid.push_messages, [m for _, m in outgoing])
        )
        failpoint("job.pushed")
        for one, message in outgoing:
            if message.metadata.message_id in sent:
                self._under_way[message.metadata.message_id] = one
                unit = self.job.units[one.unit]
                due = one.at + dispatch.lease_s(self.job, unit, one.peer)
                self._due[one.unit, one.peer] = due if self.job.is_spread else float("inf")
        self._around.ring([one.peer for one, _ in outgoing])

    async def _question(self, unit: Unit) -> tuple[wire.Action, str, ConfigRecord]:
        """How the message about a unit is called, the unit's key, and what the message holds."""
        spec = self.job.spec
        question: wire.Question
        match spec.kind:
            case "scatter":
                rows = await asyncio.to_thread(self._lane.cut, spec, unit)
                self._cut[unit.number], question = rows.input, rows
            case "private":
                question = Private(min_group=spec.min_group)
            case "analyze":
                question = Analyze(spec.query)
        payload, signature = wire.sign_unit(
            wire.Unit(
                job=self.job.id,
                unit=unit.number,
                question=question,
                task=spec.task,
                settings=spec.settings,
                models=spec.models,
            ),
            self._around.sign,
        )
        record = ConfigRecord({"unit": payload, "signature": signature})
        return wire.action(question), wire.key_of(payload), record

    # --- answers ---

    async def _collect(self) -> list[str]:
        """Write down what answers there are; their questions, to be settled."""
        if not self._under_way:
            return []
        pulled = list(
            await asyncio.to_thread(self._around.grid.pull_messages, set(self._under_way))
        )
        if pulled:
            failpoint("job.reply.pulled")
        news: list[Fact] = []
        questions = []
        for reply in pulled:
            question = reply.metadata.reply_to_message_id
            asked = self._under_way.pop(question, None)
            if asked is None:
                continue
            self._due.pop((asked.unit, asked.peer), None)
            questions.append(question)
            try:
                news += await asyncio.to_thread(self._returned, asked, reply)
            except (BadMessage, KeyError, TypeError, ValueError) as err:
                detail = printable(str(err))
                news.append(job_facts.AnswerDropped(asked.unit, asked.peer, "bad answer", detail))
        self._record(*news)
        return questions

    def _returned(self, asked: Asked, reply: Message) -> list[Fact]:
        """The facts that a reply amounts to. Raises BadMessage, KeyError, TypeError, ValueError."""
        unit, peer = self.job.units[asked.unit], asked.peer
        if reply.has_error():
            # As with updates: that its node is gone is nobody's word who is there.
            if reply.error.code != AGENT_FAILED and peer not in self._around.eligible():
                return [job_facts.LeaseEnded(unit.number, peer, "went away")]
            reason = printable(reply.error.reason or "no reason given")
            return [
                job_facts.LeaseEnded(unit.number, peer, FAILED),
                job_facts.PeerExcused(peer, reason),
            ]
        answer, body = self._read(asked, reply)
        given = Given(
            digest=answer.digest,
            nbytes=answer.nbytes,
            rows=answer.rows,
            seconds=time.monotonic() - asked.at,
            body=body,
        )
        if unit.verified:
            self._lane.drop_update(peer, given.digest)
            return [job_facts.AnswerDropped(unit.number, peer, "late")]
        self._lane.keep(peer, given)
        return [job_facts.UnitReturned(unit.number, peer, given)]

    def _read(self, asked: Asked, reply: Message) -> tuple[Answer, bytes]:
        record = cast(ConfigRecord, reply.content[ANSWER])
        payload, signature, body = record["answer"], record["signature"], record["body"]
        if not (isinstance(payload, bytes) and isinstance(signature, bytes)):
            raise TypeError("an answer and its signature are bytes")
        answer = wire.decode_answer(payload)
        signed = self._around.verify(asked.peer, signature, wire.answer_part(payload))
        if answer.peer != asked.peer or not signed:
            raise BadMessage("the answer is not signed by the peer that sent it")
        if answer.key != asked.key:
            raise BadMessage("it answers another question")
        if not isinstance(body, bytes):
            raise TypeError("an answer's body is bytes")
        if body and (len(body), hashlib.sha256(body).hexdigest()) != (answer.nbytes, answer.digest):
            raise BadMessage("the answer's bytes are not those that were signed")
        return answer, body

    async def _verify(self) -> None:
        """Look into what has returned; the first valid answer, or the first that enough give."""
        for unit in list(self.job.units.values()):
            if unit.verified or not unit.given:
                continue
            bad: list[Fact] = []
            for peer, given in unit.given.items():
                try:
                    await asyncio.to_thread(self._check, unit, given)
                except (BadMessage, OSError) as err:
                    detail = printable(str(err))
                    bad.append(job_facts.AnswerDropped(unit.number, peer, "bad answer", detail))
            self._record(*bad)
            unit = self.job.units[unit.number]
            quorum = self.job.spec.quorum if self.job.is_spread else 1
            if unit.agreed < quorum:
                continue
            digests = [given.digest for given in unit.given.values()]
            chosen = max(digests, key=digests.count)
            others = [
                job_facts.AnswerDropped(unit.number, peer, "disagrees")
                for peer, given in unit.given.items()
                if given.digest != chosen
            ]
            self._record(*others, job_facts.UnitVerified(unit.number, chosen))
            if not unit.leases and unit.number in self._cut:  # else somebody may still fetch it
                self._lane.drop(self._cut.pop(unit.number))

    def _check(self, unit: Unit, given: Given) -> None:
        """Raise BadMessage unless this can be an answer to the unit's question; OSError."""
        match self.job.spec.kind:
            case "scatter":
                rows, lines = self.job.rows(unit), self._lane.count_lines(given)
                if (given.rows, lines) != (rows, rows + 1):
                    raise BadMessage(f"{lines - 1} rows are answered where {rows} were asked for")
            case "private":
                pinned = {model.digest for model in self.job.spec.models}
                if wire.decode_scores(self._lane.read(given)).keys() != pinned:
                    raise BadMessage("it does not measure the models that were asked about")
            case "analyze":
                if wrong := ask.check(self.job.spec.query, self._lane.read(given)):
                    raise BadMessage(wrong)

    # --- taking back, writing down, telling ---

    def _forget(self, questions: set[str]) -> None:
        self._around.grid.forget(questions)
        for question in questions:
            asked = self._under_way.pop(question)
            self._due.pop((asked.unit, asked.peer), None)
        self._settle(questions, False)

    def _settle(self, questions: Iterable[str], settled: bool) -> None:
        for question in questions:
            waiting = self._settling.pop(question, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(settled)

    def _record(self, *news: Fact) -> None:
        """Write facts down, and act on none of them before. Raises DiskFull."""
        if not news:
            return
        failpoint("job.recording", type(news[0]).__name__)
        self._around.ledger.append(
            job_facts.PREFIX + self.job.id, [job_facts.encode(fact) for fact in news]
        )
        failpoint("job.recorded", type(news[-1]).__name__)
        for fact in news:
            self.job = jobs.apply(self.job, fact)
            self._tell(fact)
        self._around.publish(job_body(self.job))

    def _tell(self, fact: Fact) -> None:
        match fact:
            case job_facts.PeerExcused(peer, reason):
                name = self._around.name_of(peer)
                self._say("warning", f"job {self.job.id}: {name} is excused: {reason}", peer)
            case job_facts.AnswerDropped(unit, peer, reason, detail) if reason != "late":
                name = self._around.name_of(peer)
                text = f"job {self.job.id}: an answer of {name} to unit {unit} is dropped"
                self._say("warning", f"{text}: {detail or reason}", peer)

    def _say(self, level: Any, text: str, subject: str = "") -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        self._around.publish(
            Happened(level=level, text=printable(text), subject=subject or self.job.id)
        )
