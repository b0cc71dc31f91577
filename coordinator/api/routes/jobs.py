"""Inference and analytics jobs."""

from __future__ import annotations

from coordinator.api.routes.endpoint import Call, get, post
from coordinator.jobs.messages import job_changed
from coordinator.jobs.state import Job
from coordinator.storage.job_events import JobSpec
from protocols.messages.envelope import JobChanged


async def start_job(call: Call) -> dict[str, str]:
    return {"job": call.service.jobs.start(call.read(JobSpec))}


async def list_jobs(call: Call) -> list[Job]:
    return call.service.jobs.all()


async def show_job(call: Call) -> Job:
    return call.service.jobs.find(call.param("job"))


async def job_progress(call: Call) -> JobChanged:
    return job_changed(call.service.jobs.find(call.param("job")))


async def stop_job(call: Call) -> None:
    call.service.jobs.stop(call.service.jobs.find(call.param("job")).id)


async def job_taken(call: Call) -> None:
    call.service.jobs.mark_taken(call.param("job"))


async def resume_job(call: Call) -> None:
    call.service.jobs.resume(call.param("job"))


ROUTES = (
    get("/cw/v1/jobs", list_jobs),
    post("/cw/v1/jobs", start_job),
    get("/cw/v1/jobs/{job}", show_job),
    get("/cw/v1/jobs/{job}/stands", job_progress),
    post("/cw/v1/jobs/{job}/stop", stop_job),
    post("/cw/v1/jobs/{job}/taken", job_taken),
    post("/cw/v1/jobs/{job}/resume", resume_job),
)
