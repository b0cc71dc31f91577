"""Jobs of inference: models measured on the peers' own rows, and rows spread over the peers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from coordinator.jobs import model_refs, output
from coordinator.jobs.input import prepare
from coordinator.jobs.state import Job
from coordinator.jobs.store import JobStore
from coordinator.remote.access import ACCESS_FILE
from coordinator.remote.api_client import Remote
from coordinator.storage.job_events import JobSpec, JobState
from protocols.errors import CommonweightError, UsageError
from protocols.local.durations import parse_seconds
from protocols.messages.envelope import JobChanged

_FIRST_POLL_S, _POLL_S = 0.03, 0.2


def make_spec(
    remote: Remote,
    kind: Literal["private", "scatter"],
    models: Sequence[str],
    task: str = "",
    *,
    quorum: int = 1,
    min_group: int = 10,
    deadline: str = "10m",
) -> JobSpec:
    """The job for these models, such as "best" or RUN:latest. Raises UnknownName, UsageError."""
    if kind == "scatter" and len(models) != 1:
        raise UsageError("--scatter takes one model", "name one --model")
    found = model_refs.resolve(remote.runs(), models, task)
    is_private = kind == "private"
    return JobSpec(
        kind=kind,
        task=found.task,
        settings=found.settings,
        models=found.models,
        names=found.names,
        quorum=1 if is_private else quorum,
        min_group=min_group if is_private else 10,
        deadline_s=parse_seconds(deadline) if is_private else 0.0,
    )


def statuses(remote: Remote, job_id: str) -> Iterator[JobChanged]:
    """The status of a job until it has ended; the last one is that of the ended job."""
    wait_s = _FIRST_POLL_S
    while True:
        status = remote.job_status(job_id)
        yield status
        if status.state != JobState.WORKING:
            return
        time.sleep(wait_s)
        wait_s = min(_POLL_S, 1.5 * wait_s)


def wait(remote: Remote, job_id: str) -> Job:
    """Wait until the job has ended, and return it."""
    for _ in statuses(remote, job_id):
        pass
    return remote.job(job_id)


# --- rows that you send ----------------------------------------------------------------------


def open_store(remote: Remote) -> JobStore:
    """The store of the rows to send. Raises UsageError on other machines."""
    if remote.role != "operator" or (remote.home / ACCESS_FILE).exists():
        raise UsageError("--scatter works only on the coordinator's own machine")
    return JobStore(remote.home / "jobs")


def with_rows(spec: JobSpec, source: Path, store: JobStore) -> JobSpec:
    """The job with the rows of this file or folder, which are copied to the store.

    Raises UsageError.
    """
    rows = prepare(source, store.folder, store.suffix)
    return replace(spec, input=rows.digest, suffix=rows.suffix, blocks=rows.blocks)


def start_or_continue(remote: Remote, spec: JobSpec, store: JobStore) -> str:
    """Start the job, or continue an earlier one with the same request; return its id."""
    return find_earlier(remote, spec, store) or remote.start_job(spec)


def find_earlier(remote: Remote, spec: JobSpec, store: JobStore) -> str:
    """The id of an earlier job with the same request, whose answers are still on disk; or "".

    A job that was stopped or has failed is resumed.
    """
    for job in reversed(remote.jobs()):
        models = tuple(replace(model, nbytes=0) for model in job.spec.models)
        same = replace(job.spec, models=models, names=spec.names) == spec
        if same and not job.taken and all(map(store.has, job.on_disk)):
            if job.state in ("stopped", "failed"):
                remote.resume_job(job.id)
            return job.id
    return ""


def collect(remote: Remote, job: Job, store: JobStore, out: Path) -> int:
    """Write the answers of an ended job, which the coordinator then deletes; return their number.

    Raises CommonweightError if it has not finished.
    """
    if job.state != "finished":
        raise CommonweightError(
            f"job {job.id} {job.state}: {job.ended_because}",
            "repeat the command to continue where the job stopped",
        )
    count = output.merge(job, store, out)
    with contextlib.suppress(CommonweightError):  # the coordinator deletes the files later
        remote.mark_job_taken(job.id)
    return count
