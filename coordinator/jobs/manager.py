"""The coordinator's jobs: started, worked on side by side, recalled after a restart."""

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
from coordinator.jobs.store import JobStore
from coordinator.runs.context import RunContext
from coordinator.storage import job_events
from coordinator.storage.job_events import (
    PREFIX,
    JobEnded,
    JobResumed,
    JobSpec,
    JobStarted,
    JobState,
    JobTaken,
)
from protocols.errors import CannotBeMet, UnknownName, UsageError
from protocols.failpoints import failpoint
from protocols.messages.jobs import ModelRef

#: Jobs that the monitor still sees after a restart.
_MAX_SHOWN_JOBS = 5
#: Ended jobs whose answers nobody has taken yet: the newest so many keep their files.
_MAX_UNTAKEN_JOBS = 8


class JobManager:
    """All jobs of the ledger. All that have not ended are worked on at the same time."""

    def __init__(self, around: RunContext, store: JobStore, registry: Registry) -> None:
        self._around, self._store, self._registry = around, store, registry
        self._jobs: dict[str, Job] = {}
        self._loops: dict[str, JobLoop] = {}
        self._new: asyncio.Queue[str] = asyncio.Queue()
        ledger = around.ledger
        for subject in ledger.subjects():
            if subject.startswith(PREFIX):
                past = [job_events.decode(entry.body) for entry in ledger.entries(subject)]
                job_id = subject.removeprefix(PREFIX)
                self._jobs[job_id] = jobs.replay(job_id, past)
                if not self._jobs[job_id].ended:
                    self._pin(self._jobs[job_id])
        for job in list(self._jobs.values())[-_MAX_SHOWN_JOBS:]:
            around.publish(job_changed(job))

    async def work(self, resume: bool) -> None:
        """Drive all jobs, those of the last life first. One that fails of a disk ends them all."""
        self._sweep()
        for job in self._jobs.values():
            if not job.ended:
                if resume:
                    self._new.put_nowait(job.id)
                else:
                    self._end(job.id, "not resumed")
        async with asyncio.TaskGroup() as group:
            while True:
                job = self._jobs[await self._new.get()]
                if not job.ended:
                    loop = JobLoop(job, self._around, self._store)
                    self._loops[job.id] = loop
                    group.create_task(self._drive(loop), name=f"job {job.id}")

    async def _drive(self, loop: JobLoop) -> None:
        try:
            await loop.drive()
        finally:
            if loop.job.ended:  # else it goes on after a restart
                self._unpin(loop.job)
            if self._loops.get(loop.job.id) is loop:  # else it was made to go on already
                self._jobs[loop.job.id] = loop.job
                del self._loops[loop.job.id]
        self._sweep()

    def _pin(self, job: Job) -> None:
        """Keep a job's models from its start to its end, whichever run drops them."""
        self._around.store.pin(model.digest for model in job.spec.models)

    def _unpin(self, job: Job) -> None:
        self._around.store.unpin([model.digest for model in job.spec.models])

    def _end(self, job_id: str, because: str) -> None:
        """End a job that is not in work."""
        self._record(job_id, JobEnded(JobState.STOPPED, because, time.time()))
        self._unpin(self._jobs[job_id])

    def _referenced(self) -> set[str]:
        """Digests of files that somebody may ask for yet."""
        jobs = list(self._jobs.values())
        ended = [job for job in jobs if job.ended and not job.taken and job.on_disk]
        kept = [job for job in jobs if not job.ended] + ended[-_MAX_UNTAKEN_JOBS:]
        return {digest for job in kept for digest in job.on_disk}

    def _sweep(self) -> None:
        if not self.is_working:  # else there are units' rows, which no job's facts name
            self._store.sweep(self._referenced())

    # --- from outside ---

    def wake(self) -> None:
        """Something changed that jobs may care for."""
        for loop in self._loops.values():
            loop.changed.set()

    @property
    def is_working(self) -> bool:
        """True while any job has not ended."""
        return bool(self._loops)

    def session_opened(self, peer: str) -> None:
        for loop in self._loops.values():
            loop.session_opened(peer)

    def ack_future(self, question: str) -> asyncio.Future[bool] | None:
        """What `RunManager.settled` waits for, if the question is one of a job."""
        found = (loop.requests.ack_future(question) for loop in self._loops.values())
        return next((settling for settling in found if settling is not None), None)

    def start(self, spec: JobSpec) -> str:
        """Write a job down and begin; its id. Raises UsageError and its kin."""
        spec = self._checked(spec)
        job_id = f"{spec.kind}-{secrets.token_hex(3)}"
        fact = JobStarted(spec, time.time())
        self._around.ledger.append(PREFIX + job_id, [job_events.encode(fact)])
        failpoint("job.queued")
        self._jobs[job_id] = jobs.started(job_id, spec, fact.at)
        self._pin(self._jobs[job_id])
        self._around.publish(job_changed(self._jobs[job_id]))
        self._new.put_nowait(job_id)
        return job_id

    def _checked(self, spec: JobSpec) -> JobSpec:
        self._check_models(spec)
        spec = replace(spec, models=tuple(map(self._sized, spec.models)))
        if spec.kind != "analyze" and not spec.models:
            raise UsageError("a model is needed", "--model best, latest, or a digest")
        if spec.kind == "scatter":
            if not spec.blocks or not self._store.has(spec.input):
                raise UsageError("the job has no input")
            self._registry.check_quorum(spec.quorum)
            return spec
        peers = spec.peers or tuple(sorted(self._around.eligible()))
        if not peers:
            raise CannotBeMet("no peer is there to be asked", "commonweight peers list")
        # Units are leased by id, and each peer has one unit, however often it is named.
        ids = dict.fromkeys(self._registry.find(peer).peer for peer in peers)
        return replace(spec, peers=tuple(ids))

    def _check_models(self, spec: JobSpec) -> None:
        for model in spec.models:
            if not self._around.store.has(model.digest):
                raise UnknownName(
                    f"version {model.digest[:12]} is not kept any more", "commonweight models list"
                )

    def _sized(self, model: ModelRef) -> ModelRef:
        return ModelRef(model.digest, self._around.store.version_path(model.digest).stat().st_size)

    def stop(self, job_id: str) -> None:
        """End a job; what is verified stays."""
        if loop := self._loops.get(job_id):
            loop.stop("stopped by the operator")
        elif not self._jobs[job_id].ended:
            self._end(job_id, "stopped by the operator")

    def resume(self, job_id: str) -> None:
        """Let a job that was stopped or has failed go on. Raises CannotBeMet, UnknownName."""
        job = self.find(job_id)
        if job.state in (JobState.WORKING, JobState.FINISHED):
            raise CannotBeMet(f"job {job.id} is {job.state}", "commonweight job list")
        self._check_models(job.spec)
        self._loops.pop(job.id, None)  # it may have something to put away yet
        self._record(job.id, JobResumed())
        self._pin(self._jobs[job.id])
        self._new.put_nowait(job.id)

    def mark_taken(self, job_id: str) -> None:
        """The requester of a finished job has its answers: drop them. Raises CannotBeMet."""
        job = self.find(job_id)
        if job.state is not JobState.FINISHED:
            raise CannotBeMet(f"job {job.id} is {job.state}", "commonweight job list")
        if not job.taken:
            self._record(job.id, JobTaken())
        for digest in job.on_disk - self._referenced():
            self._store.drop(digest)

    def _record(self, job_id: str, fact: job_events.JobEvent) -> None:
        self._around.ledger.append(PREFIX + job_id, [job_events.encode(fact)])
        self._jobs[job_id] = jobs.apply(self._jobs[job_id], fact)
        self._around.publish(job_changed(self._jobs[job_id]))

    def find(self, job_id: str) -> Job:
        """A job by its id or the beginning of it. Raises UnknownName."""
        found = [job for job in self.all() if job.id.startswith(job_id)]
        if len(found) != 1:
            raise UnknownName(f"no job {job_id!r}", "commonweight job list")
        return found[0]

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        for job_id, loop in self._loops.items():
            self._jobs[job_id] = loop.job
        return list(self._jobs.values())
