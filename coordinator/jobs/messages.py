"""The status of a job: as it is published to monitors, and by peer for operators. Pure."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from msgspec import Struct

from coordinator.jobs.state import Job
from protocols.messages.envelope import Integer, JobChanged, Text, strip_controls

#: How many reasons one message holds.
_MAX_EXCUSED = 8


class JobShare(Struct, frozen=True, kw_only=True):
    """What one peer does in a job: its verified units and their rows, the units that it works on,
    the bytes of its answers, its speed, and why it takes no part (empty if it does)."""

    units: Integer = 0
    leased: Integer = 0
    rows: Integer = 0
    nbytes: Integer = 0
    rows_per_s: float = 0.0
    excused: Text = ""


def job_shares(job: Job) -> dict[str, JobShare]:
    """The share of each peer that has a part in the job."""
    units, leased, rows, nbytes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    asked = set(job.excused)
    for unit in job.units.values():
        asked |= {*unit.leases, *unit.answers} | ({unit.only} - {""})
        leased.update([] if unit.verified else list(unit.leases))
        for peer, answer in unit.answers.items():
            nbytes[peer] += answer.nbytes
            if answer.digest == unit.verified:
                units[peer] += 1
                rows[peer] += job.rows(unit) if job.is_scattered else answer.rows
    return {
        peer: JobShare(
            units=units[peer],
            leased=leased[peer],
            rows=rows[peer],
            nbytes=nbytes[peer],
            rows_per_s=job.rates.get(peer, 0.0),
            excused=strip_controls(job.excused.get(peer, "")),
        )
        for peer in sorted(asked)
    }


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
