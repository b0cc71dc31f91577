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


class JobRequest(NamedTuple):
    """A question under way: which unit, to whom, the unit's key, and how long it may take, in s."""

    unit: int
    peer: str
    key: str
    may_take_s: float


class JobReply(NamedTuple):
    """A question, what came back, and how long the peer was at it, in s."""

    request: JobRequest
    reply: Message
    seconds: float


class PendingJobRequests:
    """Those of one job that are under way. For the event loop's thread."""

    def __init__(self, around: RunContext, store: JobStore) -> None:
        self._around, self._store = around, store
        self._in_flight: dict[str, JobRequest] = {}
        self._ack_futures: dict[str, asyncio.Future[bool]] = {}
        #: By peer: since when it is at the first of its questions (monotonic s).
        self._started_at: dict[str, float] = {}
        #: By lease: when it is overdue (monotonic s); it begins anew in each life.
        self._deadlines: dict[tuple[int, str], float] = {}
        #: The digest of what peers fetch, by unit.
        self._inputs: dict[int, str] = {}

    @property
    def leases(self) -> set[tuple[int, str]]:
        """The leases (unit, peer) with a question under way."""
        return {(asked.unit, asked.peer) for asked in self._in_flight.values()}

    def deadlines(self, leases: Iterable[tuple[int, str]]) -> dict[tuple[int, str], float]:
        """When each of these leases is overdue (monotonic s), as far as one has a question."""
        return {lease: self._deadlines[lease] for lease in leases if lease in self._deadlines}

    # --- putting them ---

    async def send_open(self, job: Job) -> None:
        """Put every open lease to its peer that has no question about it. Raises BadMessage."""
        asked, eligible = self.leases, self._around.eligible()
        outgoing: list[tuple[JobRequest, Message]] = []
        for unit, peer, lease in job.leases():
            node = self._around.node_of(peer)
            wanted = lease == "open" and not unit.verified and peer in eligible
            if not wanted or (unit.number, peer) in asked or node is None:
                continue
            question, key, record = await self._question(job, unit)
            may_take_s = (
                scheduler.lease_duration_s(job, unit, peer) if job.is_scattered else float("inf")
            )
            content = RecordDict({"unit": record})
            message = Message(content, node, f"query.{question}", group_id=job.id)
            outgoing.append((JobRequest(unit.number, peer, key, may_take_s), message))
        if not outgoing:
            return
        failpoint("job.pushing")
        messages = [message for _, message in outgoing]
        sent = set(await asyncio.to_thread(self._around.grid.push_messages, messages))
        failpoint("job.pushed")
        for one, message in outgoing:
            if message.metadata.message_id in sent:
                self._in_flight[message.metadata.message_id] = one
                self._started_at.setdefault(one.peer, time.monotonic())
                self._set_deadlines(one.peer)
        self._around.ring([one.peer for one, _ in outgoing])

    def _set_deadlines(self, peer: str) -> None:
        """Each of a peer's questions may take its time, one after the other."""
        due = self._started_at.get(peer, 0.0)
        for asked in self._in_flight.values():
            if asked.peer == peer:
                due += asked.may_take_s
                self._deadlines[asked.unit, peer] = due

    async def _question(self, job: Job, unit: Unit) -> tuple[wire.QueryAction, str, ConfigRecord]:
        """How the message about a unit is called, the unit's key, and what the message holds."""
        spec = job.spec
        question: wire.UnitQuestion
        match spec.kind:
            case "scatter":
                rows = await asyncio.to_thread(self._store.write_input, spec, unit)
                self._inputs[unit.number], question = rows.input, rows
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
        return wire.query_action(question), wire.idempotency_key(payload), record

    # --- answers ---

    async def take_replies(self) -> dict[str, JobReply]:
        """What has come, by question; none of it is under way any more."""
        if not self._in_flight:
            return {}
        grid = self._around.grid
        pulled = list(await asyncio.to_thread(grid.pull_messages, set(self._in_flight)))
        if pulled:
            failpoint("job.reply.pulled")
        found = {}
        for reply in pulled:
            question = reply.metadata.reply_to_message_id
            if (asked := self._in_flight.get(question)) is not None:
                found[question] = JobReply(asked, reply, self._remove(question))
        return found

    def _remove(self, question: str) -> float:
        """A question is not under way any more; how long its peer was at it, in s."""
        asked, now = self._in_flight.pop(question), time.monotonic()
        self._deadlines.pop((asked.unit, asked.peer), None)
        began = self._started_at.pop(asked.peer, now)
        if any(other.peer == asked.peer for other in self._in_flight.values()):
            self._started_at[asked.peer] = now
            self._set_deadlines(asked.peer)
        return now - began

    def ack_future(self, question: str) -> asyncio.Future[bool] | None:
        """Done when the answer to a question of this job is in the ledger, or never will be."""
        if question not in self._in_flight:
            return None
        return self._ack_futures.setdefault(question, asyncio.get_running_loop().create_future())

    def acknowledge(self, questions: Iterable[str], settled: bool) -> None:
        for question in questions:
            waiting = self._ack_futures.pop(question, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(settled)

    # --- taking them back ---

    def cancel_from(self, peer: str) -> None:
        """A peer's new session knows nothing of messages that its last one took."""
        self._cancel({q for q, asked in self._in_flight.items() if asked.peer == peer})

    def cancel_all(self) -> None:
        """The job has ended: nobody fetches its rows any more."""
        self._cancel(set(self._in_flight))
        for digest in self._inputs.values():
            self._store.drop(digest)

    def _cancel(self, questions: set[str]) -> None:
        self._around.grid.delete_messages(questions)
        for question in questions:
            self._remove(question)
        self.acknowledge(questions, False)

    def release_input(self, unit: Unit) -> None:
        """A unit is verified; while somebody else is at it, its rows are still fetched."""
        if not unit.leases and unit.number in self._inputs:
            self._store.drop(self._inputs.pop(unit.number))
