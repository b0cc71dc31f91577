"""Inference and analytics jobs."""

from __future__ import annotations

from coordinator.api.routes.endpoint import Call, get, post, record, watch
from coordinator.jobs.messages import job_changed, job_shares
from coordinator.jobs.state import Job
from coordinator.storage.job_events import JobSpec


def find_job(call: Call) -> Job:
    return call.service.jobs.find(call.param("job"))


async def stop_job(call: Call) -> None:
    jobs, job = call.service.jobs, find_job(call).id
    if not jobs.is_driven(job):
        await call.service.registry.until_writable()
    jobs.stop(job)


ROUTES = (
    get("/cw/v1/jobs", lambda call: call.service.jobs.all(), reads="the answers of all jobs"),
    record("/cw/v1/jobs", lambda call: {"job": call.service.jobs.start(call.read(JobSpec))}),
    get("/cw/v1/jobs/{job}", find_job, reads="the answers of job {job}"),
    get(
        "/cw/v1/jobs/{job}/shares",
        lambda call: job_shares(find_job(call)),
        reads="each peer's part in job {job}",
    ),
    watch("/cw/v1/jobs/{job}/stands", lambda call: job_changed(find_job(call))),
    post("/cw/v1/jobs/{job}/stop", stop_job),
    record("/cw/v1/jobs/{job}/taken", lambda call: call.service.jobs.mark_taken(call.param("job"))),
    record("/cw/v1/jobs/{job}/resume", lambda call: call.service.jobs.resume(call.param("job"))),
)
