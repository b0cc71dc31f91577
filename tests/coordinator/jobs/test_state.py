"""Jobs without a network: any schedule of answers, losses and delays answers each row once."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.jobs import scheduler
from coordinator.jobs import state as jobs
from coordinator.jobs.scheduler import Availability
from coordinator.jobs.state import Job, UnitState
from coordinator.storage import job_events
from coordinator.storage.job_events import (
    AnswerInfo,
    Block,
    JobEnded,
    JobEvent,
    JobSpec,
    JobStarted,
    JobState,
    LeaseEnded,
    UnitLeased,
)

T = TypeVar("T")
PEERS = ("ada", "bob", "cyd", "dan")


def scattered(blocks: int = 100, rows: int = 10, **changed: Any) -> Job:
    spec = JobSpec(kind="scatter", blocks=(Block(rows, 1),) * blocks, **changed)
    return jobs.started("job", spec)


def returned(job: Job, unit: int, peer: str, seconds: float = 1.0, digest: str = "") -> JobEvent:
    rows = job.rows(job.units[unit])
    return job_events.UnitReturned(
        unit, peer, AnswerInfo(digest=digest or f"d{unit}", nbytes=1, rows=rows, seconds=seconds)
    )


def leases(job: Job, *peers: str, **view: Any) -> list[UnitLeased]:
    steps = scheduler.decide(job, Availability(frozenset(peers), **view))
    return [step for step in steps if isinstance(step, UnitLeased)]


def done(job: Job, step: UnitLeased, seconds: float = 1.0) -> Job:
    for fact in (step, None):
        job = jobs.apply(job, fact or returned(job, step.unit, step.peer, seconds))
    return jobs.apply(job, job_events.UnitVerified(step.unit, f"d{step.unit}"))


def test_a_unit_goes_through_its_states() -> None:
    job = scattered()
    (step,) = leases(job, "ada")
    job = jobs.apply(job, step)
    assert job.units[0].state is UnitState.LEASED
    ended = jobs.apply(job, LeaseEnded(0, "ada", "went away"))
    assert ended.units[0].state is UnitState.QUEUED
    job = jobs.apply(job, returned(job, 0, "ada"))
    assert job.units[0].state is UnitState.RETURNED
    job = jobs.apply(job, job_events.UnitVerified(0, "d0"))
    assert job.units[0].state is UnitState.VERIFIED
    # What a verified unit does not admit changes nothing.
    for fact in (step, returned(job, 0, "bob", digest="other")):
        assert jobs.apply(job, fact) == job


def test_the_size_of_a_unit_follows_the_peers_speed() -> None:
    job = scattered(blocks=10_000)
    for peer, seconds in (("ada", 10.0), ("bob", 40.0)):
        (step,) = leases(job, peer)
        job = done(job, step, seconds)
    ada, bob = job.rates["ada"], job.rates["bob"]
    found = {step.peer: 10 * (step.stop - step.first) for step in leases(job, "ada", "bob")}
    assert found["ada"] == pytest.approx(ada * scheduler.UNIT_S, abs=10)
    assert found["bob"] == pytest.approx(bob * scheduler.UNIT_S, abs=10)


def test_a_peer_has_a_second_unit_queued_while_many_rows_are_left() -> None:
    job = scattered(blocks=1000)
    (step,) = leases(job, "ada")
    job = jobs.apply(job, step)
    assert leases(job, "ada") == []  # its speed is not known
    job = jobs.apply(job, LeaseEnded(0, "ada", "went away"))
    job = done(job, step)
    ahead = []
    while steps := leases(job, "ada"):
        (step,) = steps
        job = jobs.apply(job, step)
        ahead.append(sum(peer == "ada" for _, peer, _ in job.leases()))
        if ahead[-1] == 2:
            first = next(unit for unit, _, _ in job.leases())
            job = jobs.apply(job, returned(job, first.number, "ada"))
            job = jobs.apply(job, job_events.UnitVerified(first.number, f"d{first.number}"))
    left = sum(job.rows(unit) for unit, _, _ in job.leases())
    assert set(ahead) == {1, 2}
    assert left <= 2 * scheduler.LAST_PART * job.total_rows


def test_all_units_of_an_overdue_peer_are_overdue() -> None:
    job = scattered(blocks=1000)
    (step,) = leases(job, "ada")
    job = done(job, step)
    for _ in range(2):
        (step,) = leases(job, "ada")
        job = jobs.apply(job, step)
    steps = scheduler.decide(job, Availability(frozenset({"ada"}), overdue=frozenset({(1, "ada")})))
    assert steps == [LeaseEnded(1, "ada", jobs.OVERDUE), LeaseEnded(2, "ada", jobs.OVERDUE)]
    for unit in (1, 2):
        job = jobs.apply(job, LeaseEnded(unit, "ada", jobs.OVERDUE))
    assert {step.unit for step in leases(job, "ada", "bob")} == {1}
    assert leases(job, "ada") == []


def test_returned_units_are_leased_before_new_rows() -> None:
    job = scattered()
    (step,) = leases(job, "ada")
    job = jobs.apply(job, step)
    assert scheduler.decide(
        job, Availability(frozenset({"bob"}), gone=frozenset({(0, "ada")}))
    ) == [LeaseEnded(0, "ada", "went away")]
    job = jobs.apply(job, LeaseEnded(0, "ada", "went away"))
    assert leases(job, "bob") == [UnitLeased(0, "bob", step.first, step.stop)]


def test_an_overdue_unit_goes_to_another_peer_and_the_first_answer_counts() -> None:
    job = scattered(blocks=1)
    (step,) = leases(job, "ada")
    job = jobs.apply(job, step)
    assert leases(job, "ada") == []
    job = jobs.apply(job, LeaseEnded(0, "ada", jobs.OVERDUE))
    (again,) = leases(job, "ada", "bob")  # ada is still at it
    assert again.peer == "bob"
    job = jobs.apply(job, again)
    job = jobs.apply(job, returned(job, 0, "ada"))  # late, and still the first
    job = jobs.apply(job, job_events.UnitVerified(0, "d0"))
    job = jobs.apply(job, job_events.AnswerDropped(0, "bob", "late"))
    assert job.units[0].answer == returned(job, 0, "ada").given  # type: ignore[union-attr]
    assert job.dropped == {"late": 1}
    assert scheduler.decide(job, Availability(frozenset(PEERS)))[0].state is JobState.FINISHED  # type: ignore[union-attr]


def test_only_the_last_rows_are_leased_twice() -> None:
    job = scattered(blocks=100)
    (slow,) = leases(job, "ada")
    job = jobs.apply(job, slow)
    twice = []
    while not job.ended and (steps := leases(job, "bob")):
        (step,) = steps
        if step.unit == slow.unit:
            twice.append(job.verified_rows)
            break
        job = done(job, step)
    assert twice == [job.total_rows - job.rows(job.units[slow.unit])]
    assert job.total_rows - twice[0] <= scheduler.LAST_PART * job.total_rows + 10


def test_a_quorum_needs_equal_answers_of_different_peers() -> None:
    job = scattered(blocks=1, quorum=2)
    for step in leases(job, "ada", "bob"):
        job = jobs.apply(job, step)
    job = jobs.apply(job, returned(job, 0, "ada", digest="right"))
    assert job.units[0].agreed == 1
    job = jobs.apply(job, returned(job, 0, "bob", digest="wrong"))
    (third,) = leases(job, "ada", "bob", "cyd")
    assert third.peer == "cyd"
    # With nobody else there it is told, and not waited for.
    (end,) = scheduler.decide(job, Availability(frozenset({"ada", "bob"})))
    assert "no 2 peers agree" in end.because  # type: ignore[union-attr]
    job = jobs.apply(jobs.apply(job, third), returned(job, 0, "cyd", digest="right"))
    assert job.units[0].agreed == 2


def test_a_unit_that_fails_everywhere_fails_the_job() -> None:
    job = scattered(blocks=1)
    for peer in PEERS[:3]:
        (step,) = leases(job, peer)
        job = jobs.apply(job, step)
        job = jobs.apply(job, LeaseEnded(0, peer, jobs.FAILED))
        job = jobs.apply(job, job_events.PeerExcused(peer, "the trainer: task"))
    (end,) = scheduler.decide(job, Availability(frozenset(PEERS)))
    assert end == JobEnded(JobState.FAILED, "unit 0 failed on 3 peers: the trainer: task")


def test_a_job_that_no_peer_can_do_ends_also_when_all_are_offline() -> None:
    job = jobs.apply(scattered(), job_events.PeerExcused("ada", "refused"))
    assert scheduler.decide(job, Availability(frozenset())) == []  # others may come yet
    (end,) = scheduler.decide(job, Availability(frozenset(), deserted=True))
    assert end == JobEnded(JobState.FAILED, "no peer can do it: refused")
    assert scheduler.decide(scattered(), Availability(frozenset(), deserted=True)) == []


def test_a_job_over_own_rows_says_how_many_peers_answered() -> None:
    job = jobs.started("job", JobSpec(kind="private", peers=("ada", "bob", "cyd")))
    steps = leases(job, "ada", "bob")
    assert {(step.unit, step.peer) for step in steps} == {(0, "ada"), (1, "bob")}
    job = jobs.apply(job, steps[0])
    job = jobs.apply(
        job, job_events.UnitReturned(0, "ada", AnswerInfo(digest="d", nbytes=1, rows=7))
    )
    job = jobs.apply(job, job_events.UnitVerified(0, "d"))
    job = jobs.apply(job, job_events.PeerExcused("bob", "refused"))
    assert scheduler.decide(job, Availability(frozenset({"ada"}))) == []  # cyd may come yet
    assert scheduler.decide(job, Availability(frozenset({"ada"}), due=True)) == [
        JobEnded(JobState.FINISHED, "1 of 3 peers answered")
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 2))
def test_any_schedule_verifies_each_row_once(seed: int, blocks: int, quorum: int) -> None:
    job, rng = scattered(blocks=blocks, quorum=quorum), Random(seed)

    def some(of: Sequence[T], least: int = 0) -> set[T]:
        return set(rng.sample(of, rng.randint(least, len(of))))

    log: list[JobEvent] = [JobStarted(job.spec)]

    def record(fact: JobEvent) -> None:
        nonlocal job
        log.append(fact)
        job = jobs.apply(job, fact)

    for _ in range(4000):
        there = frozenset(some(PEERS, 2))
        held = [(unit.number, peer) for unit, peer, _ in job.leases()]
        gone = frozenset((unit, peer) for unit, peer in held if peer not in there)
        late = frozenset(some(held))
        steps = scheduler.decide(job, Availability(there, gone, late))
        for step in steps:
            match step:
                case UnitLeased():
                    assert step.peer in there
                    held_by = [lease for _, peer, lease in job.leases() if peer == step.peer]
                    assert held_by in ([], ["open"])
                case JobEnded(state, because):
                    assert state is JobState.FINISHED, because
            record(step)
        if job.ended:
            break
        held = [(unit.number, peer) for unit, peer, _ in job.leases()]
        for unit, peer in some(held):
            if job.units[unit].verified:
                record(job_events.AnswerDropped(unit, peer, "late"))
                continue
            record(returned(job, unit, peer))
            if job.units[unit].agreed >= quorum:
                record(job_events.UnitVerified(unit, f"d{unit}"))
    assert job.ended
    spans = sorted((unit.first, unit.stop) for unit in job.units.values())
    assert [0, *(stop for _, stop in spans)] == [*(first for first, _ in spans), blocks]
    assert all(unit.verified and len(unit.answers) >= quorum for unit in job.units.values())
    assert jobs.replay("job", [job_events.decode(job_events.encode(fact)) for fact in log]) == job


def test_units_keep_their_wire_names() -> None:
    answer = AnswerInfo(digest="d", nbytes=1, rows=7)
    encoded = msgspec.json.encode(jobs.Unit(number=3, answers={"ada": answer}))
    assert msgspec.json.decode(encoded)["given"]["ada"]["digest"] == "d"
    assert "answers" not in msgspec.json.decode(encoded)
    assert msgspec.json.decode(encoded, type=jobs.Unit).answers == {"ada": answer}
