"""Drives one job: carries out the decisions of `scheduler.decide` and records the results.

It runs beside training: units are Flower messages like those of a run, and a peer does its messages
in their order. Events are in the ledger before anything is sent because of them. A peer that was
restarted, or whose coordinator was, gets its open units again and answers from its outbox.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from typing import Any

from coordinator.jobs import scheduler, validation
from coordinator.jobs import state as jobs
from coordinator.jobs.messages import job_changed
from coordinator.jobs.requests import JobReply, PendingJobRequests
from coordinator.jobs.scheduler import Availability
from coordinator.jobs.state import FAILED, Job, Unit
from coordinator.jobs.store import JobStore
from coordinator.runs.context import RunContext
from coordinator.storage import job_events
from coordinator.storage.job_events import JobEvent, JobState
from coordinator.storage.ledger import append_beside, until_answers
from protocols.errors import (
    AWAITED,
    UNDECIDED_CODES,
    Awaited,
    BadMessage,
    DiskFull,
    StorageUnreachable,
)
from protocols.local.disk_space import is_disk_full
from protocols.local.failpoints import failpoint
from protocols.local.timed_wait import wait_at_most
from protocols.messages import refusals
from protocols.messages.envelope import EventLine, strip_controls
from protocols.messages.refusals import AGENT_FAILED, Refusal

log = logging.getLogger("commonweight.job")

#: How long peers with a lease may take to come back after a restart or a lost connection.
RECONNECT_TIMEOUT_S = 20.0
_RETRY_S = 1.0
#: A peer is excused after this many refusals without consent; the reason of such a lease.
MAX_CONSENT_ASKS, _AWAITS = 16, "awaits consent"
_UNKNOWN_PEER = "the fleet has no peer with this id; start the job again for the present peers"


class JobLoop:
    """One job in work. Setting `changed`, in the loop's thread, makes it decide again."""

    def __init__(self, job: Job, ctx: RunContext, store: JobStore) -> None:
        self.job = job
        self.changed = asyncio.Event()
        self.requests = PendingJobRequests(ctx, store)
        self._ctx, self._store = ctx, store
        now = time.monotonic()
        self._patient_until = now + RECONNECT_TIMEOUT_S if any(job.leases()) else 0.0
        self._ends_at = now + job.spec.deadline_s if job.spec.deadline_s else float("inf")
        #: When a peer was available the last time (monotonic s).
        self._attended_at = now
        #: A peer that Flower could not reach gets no work until then (monotonic s), or until it has
        #: a new session.
        self._lost_until: dict[str, float] = {}
        #: Peers whose owners have not decided about the task, with their refusals; how often each
        #: was asked.
        self._awaiting: dict[str, Refusal] = {}
        self._num_asked: Counter[str] = Counter()
        #: When each of these peers was online the last time (monotonic s).
        self._awaiting_at: dict[str, float] = {}
        self._stop_reason = ""

    # --- from outside ---

    def stop(self, because: str) -> None:
        """Stop the job at the next step. Verified answers stay."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        self.requests.cancel_from(peer)
        self._lost_until.pop(peer, None)
        self._ask_again(peer)

    def awaits(self, peer: str) -> Awaited | None:
        """The decision of its owner without which the peer refused a unit; None if there is
        none."""
        return AWAITED[self._awaiting[peer].kind] if peer in self._awaiting else None

    def owner_has_decided(self, peer: str) -> None:
        """The peer's owner has allowed or forbidden a task: ask again soon."""
        if peer in self._awaiting:
            asyncio.get_running_loop().call_later(_RETRY_S, self._ask_again, peer)

    def _ask_again(self, peer: str) -> None:
        self._awaiting.pop(peer, None)
        self.changed.set()

    # --- the loop ---

    async def drive(self) -> Job:
        """Work until the job has ended. Raises what the ledger raises."""
        self._log("info", f"job {self.job.id} {'resumed' if self.job.units else 'started'}")
        while not self.job.ended:
            self.changed.clear()
            try:
                await until_answers(self._ctx.ledger)
                await self._collect()
                await self._verify()
                await self._dispatch()
                await self._wait()
            except (OSError, DiskFull, StorageUnreachable) as err:
                if not (isinstance(err, StorageUnreachable) or is_disk_full(err)):
                    raise
                await asyncio.sleep(_RETRY_S)  # nothing was decided, so the step is repeated
        self.requests.cancel_all()
        level = "error" if self.job.state is JobState.FAILED else "info"
        self._log(level, f"job {self.job.id} {self.job.state}: {self.job.ended_because}")
        return self.job

    async def _dispatch(self) -> None:
        """Decide until the job must wait or has ended, then send the open requests."""
        await self._record(*self._excuse_removed(), *self._excuse_undecided())
        while not self.job.ended:
            events = scheduler.decide(self.job, self._availability())
            if self._stop_reason:
                events = [job_events.JobEnded(JobState.STOPPED, self._stop_reason, time.time())]
            await self._record(*events)
            if not events or any(isinstance(one, job_events.UnitLeased) for one in events):
                break  # each idle peer has its unit now
        if self.job.ended:
            return
        try:
            await self.requests.send_open(self.job)
        except BadMessage as err:  # the input that the requester wrote is gone
            await self._record(job_events.JobEnded(JobState.FAILED, err.message, time.time()))

    def _excuse_removed(self) -> list[job_events.PeerExcused]:
        """Peers whose answer can never arrive, because the fleet does not have them.

        They were removed, or an older version of the coordinator recorded their names as ids.
        """
        asked = {unit.only for unit in self.job.units.values() if unit.only and not unit.verified}
        gone = sorted(peer for peer in asked - self.job.excused.keys() if not self._is_known(peer))
        return [job_events.PeerExcused(peer, _UNKNOWN_PEER) for peer in gone]

    def _excuse_undecided(self) -> list[job_events.PeerExcused]:
        """Peers whose owners have not decided when the job ends, or after very many tries, or who
        were removed."""
        is_due = time.monotonic() >= self._ends_at
        late = [
            peer
            for peer in self._awaiting
            if is_due or self._num_asked[peer] >= MAX_CONSENT_ASKS or not self._is_known(peer)
        ]
        return [
            job_events.PeerExcused(peer, self._awaiting.pop(peer).text) for peer in sorted(late)
        ]

    def _is_known(self, peer: str) -> bool:
        return self._ctx.node_of(peer) is not None

    def _availability(self) -> Availability:
        now = time.monotonic()
        lost = {peer for peer, until in self._lost_until.items() if now < until}
        online = self._ctx.eligible()
        eligible = online - lost - self._awaiting.keys()
        pending = self.requests.leases
        gone = set()
        for unit, peer, lease in self.job.leases():
            wanted = lease == "open" and not unit.verified
            away = peer not in online - lost and now >= self._patient_until
            if away or not (wanted or (unit.number, peer) in pending):
                gone.add((unit.number, peer))
        deadlines = self.requests.deadlines(pending)
        overdue = frozenset(lease for lease, at in deadlines.items() if now >= at)
        self._awaiting_at |= dict.fromkeys(self._awaiting.keys() & online, now)
        awaits_consent = any(now < at for at in self._awaiting_until())
        if eligible or awaits_consent:
            self._attended_at = now
        deserted = now >= self._attended_at + RECONNECT_TIMEOUT_S
        return Availability(
            eligible,
            frozenset(gone),
            overdue,
            due=now >= self._ends_at,
            deserted=deserted,
            awaits_consent=awaits_consent,
            at=time.time(),
        )

    def _awaiting_until(self) -> list[float]:
        """How long the job waits for each peer whose owner has not decided (monotonic s): as long
        as it is online, and for a while afterwards."""
        return [self._awaiting_at[peer] + RECONNECT_TIMEOUT_S for peer in self._awaiting]

    async def _wait(self) -> None:
        """Wait until something has changed or the next deadline has passed."""
        if self.job.ended:
            return
        now = time.monotonic()
        leases = ((u.number, p) for u, p, lease in self.job.leases() if lease == "open")
        times = [*self.requests.deadlines(leases).values(), *self._lost_until.values()]
        times += [self._patient_until, self._ends_at, self._attended_at + RECONNECT_TIMEOUT_S]
        times += self._awaiting_until()
        delay_s = min((at - now for at in times if now < at < math.inf), default=None)
        await wait_at_most(self.changed, delay_s)

    # --- answers ---

    async def _collect(self) -> None:
        """Record the answers that have come, and acknowledge them."""
        replies = await self.requests.take_replies()
        events: list[JobEvent] = []
        for reply in replies.values():
            try:
                events += await asyncio.to_thread(self._events_of, reply)
            except (BadMessage, KeyError, TypeError, ValueError) as err:
                events.append(_bad_answer(reply.request.unit, reply.request.peer, err))
        await self._record(*events)
        self.requests.acknowledge(replies, True)

    def _events_of(self, answered: JobReply) -> list[JobEvent]:
        """The events of a reply. Raises BadMessage, KeyError, TypeError, ValueError."""
        request, reply, seconds = answered
        unit, peer = self.job.units[request.unit], request.peer
        if reply.has_error():
            if reply.error.code != AGENT_FAILED:  # Flower cannot reach the node
                self._lost_until[peer] = time.monotonic() + _RETRY_S
                return [job_events.LeaseEnded(unit.number, peer, "went away")]
            refusal = refusals.decode(reply.error.reason or "")
            if refusal.kind in UNDECIDED_CODES:
                self._awaiting[peer] = refusal
                self._awaiting_at[peer] = time.monotonic()
                self._num_asked[peer] += 1
                return [job_events.LeaseEnded(unit.number, peer, _AWAITS)]
            return [
                job_events.LeaseEnded(unit.number, peer, FAILED),
                job_events.PeerExcused(peer, refusal.text),
            ]
        answer = validation.read_answer(
            request, reply, seconds, self._ctx.verify, self._ctx.check_fleet
        )
        if unit.verified:
            self._store.uploads.drop(peer, answer.digest)
            return [job_events.AnswerDropped(unit.number, peer, "late")]
        try:
            validation.check_size(self.job, answer)  # before it is stored, read or decoded
        except BadMessage:
            self._store.uploads.drop(peer, answer.digest)
            raise
        self._store.save_answer(peer, answer)
        return [job_events.UnitReturned(unit.number, peer, answer)]

    async def _verify(self) -> None:
        """Check the contents of new answers. A unit is verified once its quorum agrees."""
        for unit in list(self.job.units.values()):
            if unit.answers and not unit.verified:
                await self._verify_unit(unit)

    async def _verify_unit(self, unit: Unit) -> None:
        bad: list[JobEvent] = []
        for peer, answer in unit.answers.items():
            try:
                await asyncio.to_thread(validation.check, self.job, unit, answer, self._store)
            except (BadMessage, OSError) as err:
                bad.append(_bad_answer(unit.number, peer, err))
        await self._record(*bad)
        unit = self.job.units[unit.number]
        if unit.agreed < (self.job.spec.quorum if self.job.is_scattered else 1):
            return
        digests = [answer.digest for answer in unit.answers.values()]
        chosen = max(digests, key=digests.count)
        others = [
            job_events.AnswerDropped(unit.number, peer, "disagrees")
            for peer, answer in unit.answers.items()
            if answer.digest != chosen
        ]
        await self._record(*others, job_events.UnitVerified(unit.number, chosen))
        self.requests.release_input(self.job.units[unit.number])

    # --- recording and telling ---

    async def _record(self, *events: JobEvent) -> None:
        """Write events to the ledger, then apply and publish them.

        Raises DiskFull, StorageUnreachable.
        """
        if not events:
            return
        failpoint("job.recording", type(events[0]).__name__)
        subject = job_events.PREFIX + self.job.id
        await append_beside(
            self._ctx.ledger, subject, [job_events.encode(event) for event in events]
        )
        failpoint("job.recorded", type(events[-1]).__name__)
        for event in events:
            self.job = jobs.apply(self.job, event)
            self._warn(event)
        self._ctx.publish(job_changed(self.job))

    def _warn(self, event: JobEvent) -> None:
        match event:
            case job_events.LeaseEnded(_, peer, reason) if reason == _AWAITS:
                if self._num_asked[peer] > 1:
                    return
                awaited = self.awaits(peer) or "consent"
                why = self._awaiting[peer].text if peer in self._awaiting else ""
                text = f"{self._ctx.name_of(peer)} awaits {awaited}: {why}"
            case job_events.PeerExcused(peer, reason):
                text = f"{self._ctx.name_of(peer)} is excused: {reason}"
            case job_events.AnswerDropped(unit, peer, reason, detail) if reason != "late":
                name = self._ctx.name_of(peer)
                text = f"an answer of {name} to unit {unit} is dropped: {detail or reason}"
            case _:
                return
        self._log("warning", f"job {self.job.id}: {text}", peer)

    def _log(self, level: Any, text: str, subject: str = "") -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        subject = subject or self.job.id
        self._ctx.publish(EventLine(level=level, text=strip_controls(text), subject=subject))


def _bad_answer(unit: int, peer: str, err: Exception) -> job_events.AnswerDropped:
    return job_events.AnswerDropped(unit, peer, "bad answer", strip_controls(str(err)))
