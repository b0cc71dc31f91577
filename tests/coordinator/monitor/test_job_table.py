"""Jobs, from their events to the text in the monitor."""

from __future__ import annotations

import math

from msgspec.structs import replace

from coordinator.fleet.reducer import MAX_RUNS, reduce
from coordinator.fleet.state import Fleet, Job, rebase_times
from coordinator.jobs import state as jobs
from coordinator.jobs.messages import job_changed
from coordinator.monitor.job_table import (
    COLUMNS,
    describe_job,
    duration_s,
    num_remaining,
    num_working,
    rows_per_s,
    sort_jobs,
)
from coordinator.monitor.peer_table import fit_columns
from coordinator.storage import job_events
from coordinator.storage.job_events import AnswerInfo, Block, JobSpec, JobState
from protocols.messages.envelope import Envelope, JobChanged
from protocols.messages.topics import COORDINATOR

NOW = 1_790_000_000.0


def told(fleet: Fleet, *bodies: JobChanged, at: float = NOW, now: float = NOW) -> None:
    for body in bodies:
        fleet_seq = max(fleet.seq, 0) + 1
        reduce(fleet, Envelope(sender=COORDINATOR, epoch="e", seq=fleet_seq, at=at, body=body), now)


def changed(name: str, state: str = "working", **more: object) -> JobChanged:
    given = {"kind": "scatter", "done": 10, "total": 100, "began_at": NOW - 20} | more
    return JobChanged(job=name, state=state, **given)  # type: ignore[arg-type]


def test_a_job_message_sums_up_its_events() -> None:
    spec = JobSpec(kind="scatter", task="mnist", blocks=tuple(Block(10, 1_000) for _ in range(10)))
    job = jobs.started("scatter-1", spec, NOW)
    for fact in (
        job_events.UnitLeased(0, "ada", 0, 2),
        job_events.UnitLeased(1, "bob", 2, 5),
        job_events.UnitReturned(0, "ada", AnswerInfo(digest="d", nbytes=77, rows=20, seconds=4.0)),
        job_events.UnitVerified(0, "d"),
        job_events.UnitLeased(2, "ada", 5, 6),
        job_events.PeerExcused("cyd", "its owner\x1b[3m says no"),
        job_events.AnswerDropped(1, "dan", "late"),
    ):
        job = jobs.apply(job, fact)
    body = job_changed(job)
    assert (body.done, body.leased, body.total, body.peers) == (20, 40, 100, 2)
    assert (body.units, body.rows, body.rows_per_s) == (1, 20, 5.0)
    assert (body.bytes_up, body.bytes_down) == (77, 6_000)
    assert (body.dropped, body.num_excused) == (1, 1)
    assert body.excused == {"cyd": "its owner·[3m says no"}
    assert (body.began_at, body.ended_at) == (NOW, 0.0)
    ended = job_changed(jobs.apply(job, job_events.JobEnded(JobState.STOPPED, "enough", NOW + 9)))
    assert (ended.state, ended.ended_because, ended.ended_at) == ("stopped", "enough", NOW + 9)
    assert (ended.leased, ended.peers) == (0, 0)


def test_many_excuses_fit_into_one_message() -> None:
    job = jobs.started("private-1", JobSpec(kind="private"))
    for number in range(50):
        job = jobs.apply(job, job_events.PeerExcused(f"peer-{number}", "x" * 1_000))
    body = job_changed(job)
    assert body.num_excused == 50
    assert sum(map(len, body.excused.values())) < 8_000
    fleet = Fleet(fleet="f")
    told(fleet, body)
    words = describe_job(fleet.jobs["private-1"], fleet, NOW)
    assert words[-1][1].text == f"and {50 - len(body.excused)} more"


def test_job_times_use_the_clock_of_the_viewer() -> None:
    fleet = Fleet(fleet="f", at=NOW)
    told(fleet, changed("a", "finished", ended_at=NOW - 5), at=NOW, now=NOW + 3600)
    job = fleet.jobs["a"]
    assert (job.began_at, job.ended_at) == (NOW + 3580, NOW + 3595)
    assert duration_s(job, NOW + 9_999) == 15
    assert rebase_times(fleet, NOW + 100).jobs["a"].ended_at == NOW + 3695


def test_working_jobs_come_first_and_are_dropped_last() -> None:
    fleet = Fleet(fleet="f")
    told(fleet, changed("long"))
    for number in range(MAX_RUNS + 5):
        ended_at = NOW - 100 + number
        told(fleet, changed(f"j{number}", "finished", ended_at=ended_at), now=NOW)
    assert [job.changed.job for job in sort_jobs(fleet)[:2]] == ["long", f"j{MAX_RUNS + 4}"]
    assert (len(fleet.jobs), num_working(fleet)) == (MAX_RUNS, 1)


def test_extreme_numbers_are_shown() -> None:
    fleet = Fleet(fleet="f")
    huge = 2**62
    told(
        fleet,
        changed("a", "dancing", rows_per_s=math.nan, done=huge, total=0, leased=huge),
        changed("b", began_at=0.0, done=0, total=huge, rows=huge, rows_per_s=1e300),
        at=math.inf,
    )
    for job in sort_jobs(fleet):
        assert num_remaining(job) >= 0
        assert math.isfinite(rows_per_s(job, NOW))
        for width in (40, 80, 200):
            for column, wide in fit_columns(COLUMNS, width - 1, width):
                assert len(column.cell(job, NOW, wide).text) <= wide, column.key
        assert all(cell.text for _, cell in describe_job(job, fleet, NOW))


def test_the_speed_of_an_ended_job_is_its_mean() -> None:
    body = changed("a", "finished", ended_at=NOW - 10, rows=50, rows_per_s=900.0)
    job = Job(changed=body, changed_at=NOW, began_at=NOW - 20, ended_at=NOW - 10)
    assert rows_per_s(job, NOW) == 5
    working = replace(body, state="working")
    assert rows_per_s(Job(changed=working, changed_at=NOW), NOW) == 900


def test_a_job_without_an_answer_is_not_complete() -> None:
    jobs_fleet = Fleet(fleet="0" * 16)
    told(
        jobs_fleet,
        changed("private-1", "finished", kind="private", done=3, total=3, units=3, rows=0),
        changed("analyze-1", "finished", kind="analyze", done=2, total=2, units=0),
        changed("analyze-2", "finished", kind="analyze", done=2, total=2, units=2),
    )
    cells = {column.key: column.cell for column in COLUMNS}
    for name in ("private-1", "analyze-1"):
        job = jobs_fleet.jobs[name]
        assert cells["state"](job, NOW, 12).text == "✕ no answer"
        assert cells["done"](job, NOW, 16).text.endswith("  0 %")
        assert dict(describe_job(job, jobs_fleet, NOW))["done"].text.startswith("0 of ")
    assert cells["state"](jobs_fleet.jobs["analyze-2"], NOW, 12).text == "✓ finished"
    assert cells["done"](jobs_fleet.jobs["analyze-2"], NOW, 16).text.endswith("100 %")
