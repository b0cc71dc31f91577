"""Where jobs stand, as the monitors are told. Pure."""

from __future__ import annotations

from itertools import islice

from coordinator.jobs.state import Job
from protocols.messages.envelope import JobChanged, strip_controls

#: Reasons that go into one message.
_MAX_EXCUSED = 8


def job_changed(job: Job) -> JobChanged:
    """Where a job stands, as the monitors are told."""
    spread, units = job.is_scattered, job.units.values()
    verified = sum(bool(unit.verified) for unit in units)
    in_hand = [unit for unit in units if unit.leases and not unit.verified]
    given = [given for unit in units for given in unit.given.values()]
    return JobChanged(
        job=job.id,
        kind=job.spec.kind,
        task=job.spec.task,
        state=job.state.value,
        done=job.verified_rows if spread else verified,
        total=job.total_rows if spread else len(job.units),
        peers=len({peer for _, peer, _ in job.leases()}),
        ended_because=strip_controls(job.ended_because),
        leased=sum(job.rows(unit) if spread else 1 for unit in in_hand),
        units=verified,
        rows=job.verified_rows,
        rows_per_s=sum(job.rates.values()),
        bytes_up=sum(one.nbytes for one in given),
        bytes_down=sum(job.nbytes(unit) * (len(unit.given) + len(unit.leases)) for unit in units),
        dropped=sum(job.dropped.values()),
        num_excused=len(job.excused),
        excused={
            peer: strip_controls(reason)
            for peer, reason in islice(job.excused.items(), _MAX_EXCUSED)
        },
        began_at=job.began_at,
        ended_at=job.ended_at,
    )
