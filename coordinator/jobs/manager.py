"""The coordinator's jobs: started, driven at the same time, resumed after a restart."""

from __future__ import annotations

import asyncio
import secrets
import time

from msgspec.structs import replace

from coordinator.fleet.registry import Registry
from coordinator.jobs import state as jobs
from coordinator.jobs.loop import JobLoop
from coordinator.jobs.messages import job_changed
from coordinator.jobs.state import Job
from coordinator.jobs.store import JobStore, max_upload_bytes
from coordinator.runs.context import RunContext
from coordinator.storage import job_events
from coordinator.storage.job_events import PREFIX, JobEvent, JobSpec, JobState
from protocols.errors import Awaited, CannotBeMet, UnknownName, UsageError
from protocols.local.failpoints import failpoint
from protocols.messages.jobs import ModelRef

#: How many jobs the monitor still shows after a restart.
_MAX_SHOWN_JOBS = 5
#: How many ended jobs keep their files until the requester takes the answers: the newest ones.
_MAX_UNTAKEN_JOBS = 8


class JobManager:
    """All jobs of the ledger. All that have not ended are driven at the same time."""

    def __init__(self, ctx: RunContext, store: JobStore, registry: Registry) -> None:
        self._ctx, self._store, self._registry = ctx, store, registry
        self._jobs: dict[str, Job] = {}
        self._loops: dict[str, JobLoop] = {}
        self._new: asyncio.Queue[str] = asyncio.Queue()
        for subject in ctx.ledger.subjects():
            if subject.startswith(PREFIX):
                past = [job_events.decode(entry.body) for entry in ctx.ledger.entries(subject)]
                job = jobs.replay(subject.removeprefix(PREFIX), past)
                self._jobs[job.id] = job
                if not job.ended:
                    self._pin(job)
        for job in list(self._jobs.values())[-_MAX_SHOWN_JOBS:]:
            ctx.publish(job_changed(job))

    async def work(self, resume: bool) -> None:
        """Drive all jobs, those from before a restart first. A disk error ends them all."""
        for job in list(self._jobs.values()):
            if not job.ended:
                if resume:
                    self._new.put_nowait(job.id)
                else:
                    self._end(job.id, "not resumed")
        self._sweep()
        async with asyncio.TaskGroup() as group:
            while True:
                job = self._jobs[await self._new.get()]
                if not job.ended:
                    loop = self._loops[job.id] = JobLoop(job, self._ctx, self._store)
                    group.create_task(self._drive(loop), name=f"job {job.id}")

    async def _drive(self, loop: JobLoop) -> None:
        try:
            await loop.drive()
        finally:
            if loop.job.ended:  # otherwise it continues after a restart
                self._unpin(loop.job)
            if self._loops.get(loop.job.id) is loop:  # otherwise it was resumed already
                self._jobs[loop.job.id] = loop.job
                del self._loops[loop.job.id]
        self._sweep()

    def _pin(self, job: Job) -> None:
        """Keep a job's models until it ends, whichever run drops them."""
        self._ctx.store.pin(model.digest for model in job.spec.models)

    def _unpin(self, job: Job) -> None:
        self._ctx.store.unpin([model.digest for model in job.spec.models])

    def _end(self, job_id: str, because: str) -> None:
        """Stop a job that no loop drives."""
        self._record(job_id, job_events.JobEnded(JobState.STOPPED, because, time.time()))
        self._unpin(self._jobs[job_id])

    def _referenced(self) -> set[str]:
        """Digests of files that are still needed."""
        jobs = list(self._jobs.values())
        untaken = [job for job in jobs if job.ended and not job.taken and job.on_disk]
        kept = [job for job in jobs if not job.ended] + untaken[-_MAX_UNTAKEN_JOBS:]
        return {digest for job in kept for digest in job.on_disk}

    def max_answer_bytes(self, peer: str) -> int:
        """The size of the largest answer that this peer may upload now; 0 without a unit."""
        return max(
            (
                max_upload_bytes(job, unit)
                for job in self.all()
                if not job.ended
                for unit, holder, _ in job.leases()
                if holder == peer
            ),
            default=0,
        )

    def _drop_unexpected(self) -> None:
        """Delete the uploads of peers that have no unit any more."""
        for peer in self._store.uploads.peers():
            if not self.max_answer_bytes(peer):
                self._store.uploads.forget(peer, frozenset())

    def _sweep(self) -> None:
        self._drop_unexpected()
        if not self.is_working:  # the rows of units, which no event names, are needed until then
            self._store.sweep(self._referenced())

    # --- from outside ---

    def wake(self) -> None:
        """Make all jobs decide again."""
        for loop in self._loops.values():
            loop.changed.set()

    @property
    def is_working(self) -> bool:
        """True while any job has not ended."""
        return bool(self._loops)

    def session_opened(self, peer: str) -> None:
        for loop in self._loops.values():
            loop.session_opened(peer)

    def owner_has_decided(self, peer: str) -> None:
        """The peer's owner has allowed or forbidden a task."""
        for loop in self._loops.values():
            loop.owner_has_decided(peer)

    def awaits(self, peer: str) -> tuple[str, Awaited] | None:
        """The task of a job, and the decision that it awaits from this peer's owner; None if no job
        awaits one."""
        decisions = ((one.job.spec.task, one.awaits(peer)) for one in self._loops.values())
        return next(((task, decision) for task, decision in decisions if decision), None)

    def ack_future(self, message_id: str) -> asyncio.Future[bool] | None:
        """The future for `RunManager.acknowledged`, if the request belongs to a job."""
        found = (loop.requests.ack_future(message_id) for loop in self._loops.values())
        return next((future for future in found if future is not None), None)

    def start(self, spec: JobSpec) -> str:
        """Record a job and start it; return its id. Raises UsageError and its kin."""
        spec = self._checked(spec)
        job_id = f"{spec.kind}-{secrets.token_hex(3)}"
        event = job_events.JobStarted(spec, time.time())
        self._ctx.ledger.append(PREFIX + job_id, [job_events.encode(event)])
        failpoint("job.queued")
        job = self._jobs[job_id] = jobs.started(job_id, spec, event.at)
        self._pin(job)
        self._ctx.publish(job_changed(job))
        self._new.put_nowait(job_id)
        return job_id

    def _checked(self, spec: JobSpec) -> JobSpec:
        """The spec with the sizes of its models and the ids of its peers."""
        self._check_models(spec)
        spec = replace(spec, models=tuple(map(self._with_size, spec.models)))
        if spec.kind != "analyze" and not spec.models:
            raise UsageError("a model is needed", "--model best, latest, or a digest")
        if spec.kind == "scatter":
            if not spec.blocks or not self._store.has(spec.input):
                raise UsageError("the job has no input")
            self._registry.check_quorum(spec.quorum)
            return spec
        peers = spec.peers or tuple(sorted(self._ctx.eligible()))
        if not peers:
            raise CannotBeMet(
                "no peer can answer now: each is away or paused", "to see why: commonweight status"
            )
        # Units are leased by id, and each peer has one unit, however often it is named.
        ids = dict.fromkeys(self._registry.find(peer).peer for peer in peers)
        return replace(spec, peers=tuple(ids))

    def _check_models(self, spec: JobSpec) -> None:
        for model in spec.models:
            if not self._ctx.store.has(model.digest):
                raise UnknownName(
                    f"version {model.digest[:12]} was deleted", "commonweight models list"
                )

    def _with_size(self, model: ModelRef) -> ModelRef:
        return ModelRef(model.digest, self._ctx.store.version_path(model.digest).stat().st_size)

    def is_driven(self, job_id: str) -> bool:
        """Whether a loop drives the job. It records its end; `stop` that of another job."""
        return job_id in self._loops

    def stop(self, job_id: str) -> None:
        """Stop a job. Verified answers stay."""
        if loop := self._loops.get(job_id):
            loop.stop("stopped by the operator")
        elif not self._jobs[job_id].ended:
            self._end(job_id, "stopped by the operator")

    def resume(self, job_id: str) -> None:
        """Resume a job that was stopped or has failed. Raises CannotBeMet, UnknownName."""
        job = self.find(job_id)
        if job.state in (JobState.WORKING, JobState.FINISHED):
            raise CannotBeMet(f"job {job.id} is {job.state}", "commonweight infer list")
        self._check_models(job.spec)
        self._loops.pop(job.id, None)  # its last loop may still be finishing
        self._record(job.id, job_events.JobResumed())
        self._pin(self._jobs[job.id])
        self._new.put_nowait(job.id)

    def mark_taken(self, job_id: str) -> None:
        """Delete the files of a finished job: its requester has the answers. Raises CannotBeMet."""
        job = self.find(job_id)
        if job.state is not JobState.FINISHED:
            raise CannotBeMet(f"job {job.id} is {job.state}", "commonweight infer list")
        if not job.taken:
            self._record(job.id, job_events.JobTaken())
        for digest in job.on_disk - self._referenced():
            self._store.drop(digest)

    def _record(self, job_id: str, event: JobEvent) -> None:
        self._ctx.ledger.append(PREFIX + job_id, [job_events.encode(event)])
        job = self._jobs[job_id] = jobs.apply(self._jobs[job_id], event)
        self._ctx.publish(job_changed(job))

    def find(self, job_id: str) -> Job:
        """A job by its id or the start of it. Raises UnknownName."""
        found = [job for job in self.all() if job.id.startswith(job_id)]
        if len(found) != 1:
            raise UnknownName(f"no job {job_id!r}", "commonweight infer list")
        return found[0]

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        self._jobs |= {job_id: loop.job for job_id, loop in self._loops.items()}
        return list(self._jobs.values())
