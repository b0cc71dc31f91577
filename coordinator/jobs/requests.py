"""The questions of one job: put to peers as signed units, overdue at some time, taken back.

A question is one message about one unit to one peer, under way until its answer is collected. One
that a peer has in hand behind another begins when that one's answer is here: from then on its time
is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict

from coordinator.jobs import scheduler
from coordinator.jobs.state import Job, Unit
from coordinator.jobs.store import JobStore
from coordinator.runs.context import RunContext
from protocols.failpoints import failpoint
from protocols.messages import jobs as wire
from protocols.messages.jobs import Analyze, Private


class Asked(NamedTuple):
    """A question under way: which unit, to whom, the unit's key, and how long it may take, in s."""

    unit: int
    peer: str
    key: str
    may_take_s: float


class Answered(NamedTuple):
    """A question, what came back, and how long the peer was at it, in s."""

    asked: Asked
    reply: Message
    seconds: float


class JobQuestions:
    """Those of one job that are under way. For the event loop's thread."""

    def __init__(self, around: RunContext, store: JobStore) -> None:
        self._around, self._store = around, store
        self._under_way: dict[str, Asked] = {}
        self._settling: dict[str, asyncio.Future[bool]] = {}
        #: By peer: since when it is at the first of its questions (monotonic s).
        self._began: dict[str, float] = {}
        #: By lease: when it is overdue (monotonic s); it begins anew in each life.
        self._due: dict[tuple[int, str], float] = {}
        #: The digest of what peers fetch, by unit.
        self._cut: dict[int, str] = {}

    @property
    def asked(self) -> set[tuple[int, str]]:
        """The leases (unit, peer) with a question under way."""
        return {(asked.unit, asked.peer) for asked in self._under_way.values()}

    def due(self, leases: Iterable[tuple[int, str]]) -> dict[tuple[int, str], float]:
        """When each of these leases is overdue (monotonic s), as far as one has a question."""
        return {lease: self._due[lease] for lease in leases if lease in self._due}

    # --- putting them ---

    async def put(self, job: Job) -> None:
        """Put every open lease to its peer that has no question about it. Raises BadMessage."""
        asked, eligible = self.asked, self._around.eligible()
        outgoing: list[tuple[Asked, Message]] = []
        for unit, peer, lease in job.leases():
            node = self._around.node_of(peer)
            wanted = lease == "open" and not unit.verified and peer in eligible
            if not wanted or (unit.number, peer) in asked or node is None:
                continue
            question, key, record = await self._question(job, unit)
            may_take_s = scheduler.lease_s(job, unit, peer) if job.is_spread else float("inf")
            content = RecordDict({"unit": record})
            message = Message(content, node, f"query.{question}", group_id=job.id)
            outgoing.append((Asked(unit.number, peer, key, may_take_s), message))
        if not outgoing:
            return
        failpoint("job.pushing")
        messages = [message for _, message in outgoing]
        sent = set(await asyncio.to_thread(self._around.grid.push_messages, messages))
        failpoint("job.pushed")
        for one, message in outgoing:
            if message.metadata.message_id in sent:
                self._under_way[message.metadata.message_id] = one
                self._began.setdefault(one.peer, time.monotonic())
                self._set_due(one.peer)
        self._around.ring([one.peer for one, _ in outgoing])

    def _set_due(self, peer: str) -> None:
        """Each of a peer's questions may take its time, one after the other."""
        due = self._began.get(peer, 0.0)
        for asked in self._under_way.values():
            if asked.peer == peer:
                due += asked.may_take_s
                self._due[asked.unit, peer] = due

    async def _question(self, job: Job, unit: Unit) -> tuple[wire.Action, str, ConfigRecord]:
        """How the message about a unit is called, the unit's key, and what the message holds."""
        spec = job.spec
        question: wire.Question
        match spec.kind:
            case "scatter":
                rows = await asyncio.to_thread(self._store.cut, spec, unit)
                self._cut[unit.number], question = rows.input, rows
            case "private":
                question = Private(min_group=spec.min_group)
            case "analyze":
                question = Analyze(spec.query)
        payload, signature = wire.SIGNED_UNIT.seal(
            wire.Unit(
                job=job.id,
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

    async def answers(self) -> dict[str, Answered]:
        """What has come, by question; none of it is under way any more."""
        if not self._under_way:
            return {}
        grid = self._around.grid
        pulled = list(await asyncio.to_thread(grid.pull_messages, set(self._under_way)))
        if pulled:
            failpoint("job.reply.pulled")
        found = {}
        for reply in pulled:
            question = reply.metadata.reply_to_message_id
            if (asked := self._under_way.get(question)) is not None:
                found[question] = Answered(asked, reply, self._end(question))
        return found

    def _end(self, question: str) -> float:
        """A question is not under way any more; how long its peer was at it, in s."""
        asked, now = self._under_way.pop(question), time.monotonic()
        self._due.pop((asked.unit, asked.peer), None)
        began = self._began.pop(asked.peer, now)
        if any(other.peer == asked.peer for other in self._under_way.values()):
            self._began[asked.peer] = now
            self._set_due(asked.peer)
        return now - began

    def settling(self, question: str) -> asyncio.Future[bool] | None:
        """Done when the answer to a question of this job is in the ledger, or never will be."""
        if question not in self._under_way:
            return None
        return self._settling.setdefault(question, asyncio.get_running_loop().create_future())

    def settle(self, questions: Iterable[str], settled: bool) -> None:
        for question in questions:
            waiting = self._settling.pop(question, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(settled)

    # --- taking them back ---

    def take_back_from(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        self._take_back({q for q, asked in self._under_way.items() if asked.peer == peer})

    def take_back_all(self) -> None:
        """The job has ended: nobody fetches its rows any more."""
        self._take_back(set(self._under_way))
        for digest in self._cut.values():
            self._store.drop(digest)

    def _take_back(self, questions: set[str]) -> None:
        self._around.grid.forget(questions)
        for question in questions:
            self._end(question)
        self.settle(questions, False)

    def done_with(self, unit: Unit) -> None:
        """A unit is verified; while somebody else is at it, its rows are still fetched."""
        if not unit.leases and unit.number in self._cut:
            self._store.drop(self._cut.pop(unit.number))
