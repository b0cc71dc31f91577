"""The requests of one job that wait for a reply: sent, overdue at some time, cancelled.

A request is a Flower message about one unit to one peer. A peer does its requests one after the
other, so the time for a queued request starts when the reply to the one before it is here.
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
from coordinator.runs.in_flight import InFlight
from coordinator.storage.job_events import JobSpec
from protocols.local.failpoints import failpoint
from protocols.messages import jobs as wire


class JobRequest(NamedTuple):
    """The unit, the peer, the key of the signed unit, and how long it may take, in s."""

    unit: int
    peer: str
    key: str
    may_take_s: float


class JobReply(NamedTuple):
    """A request, its reply, and how long the peer worked on it, in s."""

    request: JobRequest
    reply: Message
    seconds: float


class PendingJobRequests(InFlight[JobRequest]):
    """The pending requests of one job, by message id. Runs in the event loop's thread."""

    def __init__(self, ctx: RunContext, store: JobStore) -> None:
        super().__init__()
        self._ctx, self._store = ctx, store
        #: By peer: when it started with the first of its requests (monotonic s).
        self._started_at: dict[str, float] = {}
        #: By lease: when it is overdue (monotonic s). A restart resets it.
        self._deadlines: dict[tuple[int, str], float] = {}
        #: By unit: the digest of the rows that its peers download.
        self._inputs: dict[int, str] = {}

    @property
    def leases(self) -> set[tuple[int, str]]:
        """The leases (unit, peer) with a pending request."""
        return {(request.unit, request.peer) for request in self._in_flight.values()}

    def deadlines(self, leases: Iterable[tuple[int, str]]) -> dict[tuple[int, str], float]:
        """When each of these leases that has a request is overdue (monotonic s)."""
        return {lease: self._deadlines[lease] for lease in leases if lease in self._deadlines}

    # --- sending ---

    async def send_open(self, job: Job) -> None:
        """Send a request for each open lease that has none. Raises BadMessage."""
        pending, eligible = self.leases, self._ctx.eligible()
        outgoing: list[tuple[JobRequest, Message]] = []
        for unit, peer, lease in job.leases():
            node = self._ctx.node_of(peer)
            wanted = lease == "open" and not unit.verified and peer in eligible
            if wanted and (unit.number, peer) not in pending and node is not None:
                outgoing.append(await self._request(job, unit, peer, node))
        if not outgoing:
            return
        failpoint("job.pushing")
        messages = [message for _, message in outgoing]
        sent = set(await asyncio.to_thread(self._ctx.grid.push_messages, messages))
        failpoint("job.pushed")
        for request, message in outgoing:
            if message.metadata.message_id in sent:
                self._in_flight[message.metadata.message_id] = request
                self._started_at.setdefault(request.peer, time.monotonic())
                self._set_deadlines(request.peer)
        self._ctx.ring([request.peer for request, _ in outgoing])

    def _set_deadlines(self, peer: str) -> None:
        """Set the deadlines of a peer's requests, which it does one after the other."""
        at = self._started_at.get(peer, 0.0)
        for request in self._in_flight.values():
            if request.peer == peer:
                at += request.may_take_s
                self._deadlines[request.unit, peer] = at

    async def _request(
        self, job: Job, unit: Unit, peer: str, node: int
    ) -> tuple[JobRequest, Message]:
        """A signed request for a unit, and its Flower message."""
        spec, may_take_s = job.spec, float("inf")
        question: wire.UnitQuestion
        match spec.kind:
            case "scatter":
                may_take_s = scheduler.lease_duration_s(job, unit, peer)
                question = await asyncio.to_thread(self._store.write_input, spec, unit)
                self._inputs[unit.number] = question.input
            case "private":
                question = wire.Private(min_group=spec.min_group)
            case "analyze":
                question = _question(spec, unit)
        signed = wire.Unit(
            job=job.id,
            unit=unit.number,
            question=question,
            task=spec.task,
            settings=spec.settings,
            models=spec.models,
            fleet=self._ctx.fleet,
        )
        payload, signature = wire.SIGNED_UNIT.seal(signed, self._ctx.sign)
        content = RecordDict({"unit": ConfigRecord({"unit": payload, "signature": signature})})
        action = f"query.{wire.query_action(question)}"
        request = JobRequest(unit.number, peer, wire.idempotency_key(payload), may_take_s)
        return request, Message(content, node, action, group_id=job.id)

    # --- replies ---

    async def take_replies(self) -> dict[str, JobReply]:
        """The replies that have come, by message id. Their requests are not pending any more."""
        if not self._in_flight:
            return {}
        pull = self._ctx.grid.pull_messages
        replies = list(await asyncio.to_thread(pull, set(self._in_flight)))
        if replies:
            failpoint("job.reply.pulled")
        found = {}
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id
            if (request := self._in_flight.get(message_id)) is not None:
                found[message_id] = JobReply(request, reply, self._remove(message_id))
        return found

    def _remove(self, message_id: str) -> float:
        """Remove a pending request; return how long its peer worked on it, in s."""
        request, now = self._in_flight.pop(message_id), time.monotonic()
        self._deadlines.pop((request.unit, request.peer), None)
        started_at = self._started_at.pop(request.peer, now)
        if any(other.peer == request.peer for other in self._in_flight.values()):
            self._started_at[request.peer] = now
            self._set_deadlines(request.peer)
        return now - started_at

    # --- cancelling ---

    def cancel_from(self, peer: str) -> None:
        """Cancel a peer's requests: its new session does not know those of the last one."""
        self._cancel({key for key, request in self._in_flight.items() if request.peer == peer})

    def cancel_all(self) -> None:
        """Cancel all requests and delete their input: the job has ended."""
        self._cancel(set(self._in_flight))
        for digest in self._inputs.values():
            self._store.drop(digest)

    def _cancel(self, message_ids: set[str]) -> None:
        self._ctx.grid.delete_messages(message_ids)
        for message_id in message_ids:
            self._remove(message_id)
        self.acknowledge(message_ids, False)

    def release_input(self, unit: Unit) -> None:
        """Delete the rows of a verified unit, unless another peer may still download them."""
        if not unit.leases and unit.number in self._inputs:
            self._store.drop(self._inputs.pop(unit.number))


def _question(spec: JobSpec, unit: Unit) -> wire.UnitQuestion:
    """The question to a peer about its own table."""
    if (secure := spec.secure) is None:
        return wire.Analyze(spec.query, spec.method)
    some = secure.requests
    request = some[unit.number if len(some) > 1 else 0] if some else b""
    return wire.SecureAnalyze(
        query=spec.query,
        session=secure.session,
        step=secure.step,
        request=request,
        method=spec.method,
    )
