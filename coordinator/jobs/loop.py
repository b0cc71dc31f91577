"""Drives one job: does what `scheduler.decide` says, and writes down what came of it.

Beside training: units are Flower messages like a run's questions, and a peer takes one after the
other as they come. Facts are in the ledger before anything is sent because of them. A peer that
comes back after its end, or ours, is asked for its open units again and answers from its outbox.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from coordinator.jobs import scheduler, validation
from coordinator.jobs import state as jobs
from coordinator.jobs.messages import job_changed
from coordinator.jobs.requests import JobReply, PendingJobRequests
from coordinator.jobs.scheduler import Availability
from coordinator.jobs.state import FAILED, Job
from coordinator.jobs.store import JobStore
from coordinator.runs.context import RunContext
from coordinator.runs.requests import AGENT_FAILED
from coordinator.storage import job_events
from coordinator.storage.job_events import AnswerDropped, JobEvent, JobState, LeaseEnded
from protocols.errors import BadMessage, DiskFull
from protocols.failpoints import failpoint
from protocols.local.disk_space import is_disk_full
from protocols.messages.envelope import EventLine, strip_controls

log = logging.getLogger("commonweight.job")

#: How long peers that were at work may take to come back, after a restart or a lost link.
RECONNECT_TIMEOUT_S = 20.0
_RETRY_S = 1.0


class JobLoop:
    """One job in work. `changed` is set by whoever has news for it, in the loop's thread."""

    def __init__(self, job: Job, around: RunContext, store: JobStore) -> None:
        self.job = job
        self.changed = asyncio.Event()
        self.requests = PendingJobRequests(around, store)
        self._around, self._store = around, store
        now = time.monotonic()
        self._patient_until = now + RECONNECT_TIMEOUT_S if any(job.leases()) else 0.0
        self._ends_at = now + job.spec.deadline_s if job.spec.deadline_s else float("inf")
        #: When anybody could be given work the last time (monotonic s).
        self._attended_at = now
        #: Peers that Flower could not reach get no more until then (monotonic s), or a new session.
        self._lost_until: dict[str, float] = {}
        self._stop_reason = ""

    # --- from outside ---

    def stop(self, because: str) -> None:
        """End the job at the next step; what is verified stays."""
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        self.requests.cancel_from(peer)
        self._lost_until.pop(peer, None)
        self.changed.set()

    # --- the loop ---

    async def drive(self) -> Job:
        """Work until the job has ended. Raises what the ledger raises."""
        self._say("info", f"job {self.job.id} {'goes on' if self.job.units else 'started'}")
        while not self.job.ended:
            self.changed.clear()
            try:
                await self._collect()
                await self._verify()
                await self._turn()
                await self._wait()
            except (OSError, DiskFull) as err:
                if not is_disk_full(err):
                    raise
                await asyncio.sleep(_RETRY_S)  # nothing was decided: the same again
        self.requests.cancel_all()
        level = "error" if self.job.state is JobState.FAILED else "info"
        self._say(level, f"job {self.job.id} {self.job.state}: {self.job.ended_because}")
        return self.job

    async def _turn(self) -> None:
        """Decide until there is only to wait, then ask whoever is to be asked."""
        try:
            await self._dispatch()
        except BadMessage as err:  # what the requester gave is not there any more
            self._record(job_events.JobEnded(JobState.FAILED, err.message, time.time()))

    async def _dispatch(self) -> None:
        while not self.job.ended:
            steps = scheduler.decide(self.job, self._view())
            if self._stop_reason:
                steps = [scheduler.End(JobState.STOPPED, self._stop_reason)]
            if not steps:
                break
            self._record(*map(_fact, steps))
            if any(isinstance(step, scheduler.Lease) for step in steps):
                break  # each free peer has its unit now
        if not self.job.ended:
            await self.requests.send_open(self.job)

    def _view(self) -> Availability:
        now = time.monotonic()
        lost = {peer for peer, until in self._lost_until.items() if now < until}
        eligible = self._around.eligible() - lost
        asked = self.requests.leases
        gone = set()
        for unit, peer, lease in self.job.leases():
            wanted = lease == "open" and not unit.verified
            away = peer not in eligible and now >= self._patient_until
            if away or not (wanted or (unit.number, peer) in asked):
                gone.add((unit.number, peer))
        due = self.requests.deadlines(asked)
        overdue = frozenset(lease for lease, at in due.items() if now >= at)
        if eligible:
            self._attended_at = now
        deserted = now >= self._attended_at + RECONNECT_TIMEOUT_S
        return Availability(eligible, frozenset(gone), overdue, now >= self._ends_at, deserted)

    async def _wait(self) -> None:
        if self.job.ended:
            return
        now = time.monotonic()
        leases = ((u.number, p) for u, p, lease in self.job.leases() if lease == "open")
        times = [*self.requests.deadlines(leases).values(), *self._lost_until.values()]
        times += [self._patient_until, self._ends_at, self._attended_at + RECONNECT_TIMEOUT_S]
        ahead = min((at - now for at in times if at > now), default=None)
        try:
            async with asyncio.timeout(None if ahead == float("inf") else ahead):
                await self.changed.wait()
        except TimeoutError:
            pass  # something is due: decide again

    # --- answers ---

    async def _collect(self) -> None:
        """Write down what answers there are, and let their senders go on."""
        found = await self.requests.take_replies()
        news: list[JobEvent] = []
        for answered in found.values():
            try:
                news += await asyncio.to_thread(self._returned, answered)
            except (BadMessage, KeyError, TypeError, ValueError) as err:
                unit, peer, detail = (
                    answered.request.unit,
                    answered.request.peer,
                    strip_controls(str(err)),
                )
                news.append(AnswerDropped(unit, peer, "bad answer", detail))
        self._record(*news)
        self.requests.acknowledge(found, True)

    def _returned(self, answered: JobReply) -> list[JobEvent]:
        """The facts that a reply amounts to. Raises BadMessage, KeyError, TypeError, ValueError."""
        asked, reply, seconds = answered
        unit, peer = self.job.units[asked.unit], asked.peer
        if reply.has_error():
            if reply.error.code != AGENT_FAILED:  # Flower's own, of a node that it cannot reach
                self._lost_until[peer] = time.monotonic() + _RETRY_S
                return [LeaseEnded(unit.number, peer, "went away")]
            reason = strip_controls(reply.error.reason or "no reason given")
            return [
                LeaseEnded(unit.number, peer, FAILED),
                job_events.PeerExcused(peer, reason),
            ]
        given = validation.read(asked, reply, seconds, self._around.verify)
        if unit.verified:
            self._store.uploads.drop(peer, given.digest)
            return [AnswerDropped(unit.number, peer, "late")]
        self._store.save_answer(peer, given)
        return [job_events.UnitReturned(unit.number, peer, given)]

    async def _verify(self) -> None:
        """Look into what has returned; the first valid answer, or the first that enough give."""
        for unit in list(self.job.units.values()):
            if unit.verified or not unit.given:
                continue
            bad: list[JobEvent] = []
            for peer, given in unit.given.items():
                try:
                    await asyncio.to_thread(validation.check, self.job, unit, given, self._store)
                except (BadMessage, OSError) as err:
                    detail = strip_controls(str(err))
                    bad.append(AnswerDropped(unit.number, peer, "bad answer", detail))
            self._record(*bad)
            unit = self.job.units[unit.number]
            quorum = self.job.spec.quorum if self.job.is_scattered else 1
            if unit.agreed < quorum:
                continue
            digests = [given.digest for given in unit.given.values()]
            chosen = max(digests, key=digests.count)
            others = [
                AnswerDropped(unit.number, peer, "disagrees")
                for peer, given in unit.given.items()
                if given.digest != chosen
            ]
            self._record(*others, job_events.UnitVerified(unit.number, chosen))
            self.requests.release_input(self.job.units[unit.number])

    # --- writing down, telling ---

    def _record(self, *news: JobEvent) -> None:
        """Write facts down, and act on none of them before. Raises DiskFull."""
        if not news:
            return
        failpoint("job.recording", type(news[0]).__name__)
        self._around.ledger.append(
            job_events.PREFIX + self.job.id, [job_events.encode(fact) for fact in news]
        )
        failpoint("job.recorded", type(news[-1]).__name__)
        for fact in news:
            self.job = jobs.apply(self.job, fact)
            self._tell(fact)
        self._around.publish(job_changed(self.job))

    def _tell(self, fact: JobEvent) -> None:
        match fact:
            case job_events.PeerExcused(peer, reason):
                name = self._around.name_of(peer)
                self._say("warning", f"job {self.job.id}: {name} is excused: {reason}", peer)
            case AnswerDropped(unit, peer, reason, detail) if reason != "late":
                name = self._around.name_of(peer)
                text = f"job {self.job.id}: an answer of {name} to unit {unit} is dropped"
                self._say("warning", f"{text}: {detail or reason}", peer)

    def _say(self, level: Any, text: str, subject: str = "") -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        self._around.publish(
            EventLine(level=level, text=strip_controls(text), subject=subject or self.job.id)
        )


def _fact(step: scheduler.Step) -> JobEvent:
    match step:
        case scheduler.Lease(unit, peer, first, stop):
            return job_events.UnitLeased(unit, peer, first, stop)
        case scheduler.EndLease(unit, peer, reason):
            return LeaseEnded(unit, peer, reason)
        case scheduler.End(state, because):
            return job_events.JobEnded(state, because, time.time())
