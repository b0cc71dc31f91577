"""The status of a job, as it is published to the monitors. Pure."""

from __future__ import annotations

from itertools import islice

from coordinator.jobs.state import Job
from protocols.messages.envelope import JobChanged, strip_controls

#: How many reasons one message holds.
_MAX_EXCUSED = 8


def job_changed(job: Job) -> JobChanged:
    """The status of a job. `done`, `total` and `leased` count rows, or peers for their own rows."""
    rows, units = job.is_scattered, job.units.values()
    num_verified = sum(bool(unit.verified) for unit in units)
    leased = [unit for unit in units if unit.leases and not unit.verified]
    excused = islice(job.excused.items(), _MAX_EXCUSED)
    return JobChanged(
        job=job.id,
        kind=job.spec.kind,
        task=job.spec.task,
        state=job.state.value,
        done=job.verified_rows if rows else num_verified,
        total=job.total_rows if rows else len(job.units),
        peers=len({peer for _, peer, _ in job.leases()}),
        ended_because=strip_controls(job.ended_because),
        leased=sum(map(job.rows, leased)) if rows else len(leased),
        units=num_verified,
        rows=job.verified_rows,
        rows_per_s=sum(job.rates.values()),
        bytes_up=sum(answer.nbytes for unit in units for answer in unit.answers.values()),
        bytes_down=sum(job.nbytes(unit) * (len(unit.answers) + len(unit.leases)) for unit in units),
        dropped=sum(job.dropped.values()),
        num_excused=len(job.excused),
        excused={peer: strip_controls(reason) for peer, reason in excused},
        began_at=job.began_at,
        ended_at=job.ended_at,
    )
