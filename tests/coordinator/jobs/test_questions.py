"""`analyze list`: the steps of a question are one line, with the state of the whole question."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.jobs.questions import questions
from coordinator.jobs.state import Job
from coordinator.storage.job_events import JobSpec, JobState, SecureStep
from protocols.analytics import parser

QUERY = parser.parse_query("count, mean(age)", "")


def job(number: int, state: str = "finished", **fields: Any) -> Job:
    text = msgspec.json.encode(QUERY).decode()
    spec = JobSpec(kind="analyze", query=text, **fields)
    return Job(id=f"analyze-{number}", spec=spec, state=JobState(state), ended_at=100.0)


def step(number: int, step: Any, state: str = "finished", question: str = "") -> Job:
    return job(number, state, secure=SecureStep(session="s", step=step), question=question)


def test_each_question_is_one_with_its_text() -> None:
    jobs = [
        job(1),
        job(2, method="glm(ill ~ age)", question="q"),
        job(3, method="glm(ill ~ age)", question="q"),
        step(4, "shape"),
        step(5, "unmask"),
        job(6, "failed"),
    ]
    found = questions(jobs, 999.0)
    assert [(one.job, len(one.steps), one.state) for one in found] == [
        ("analyze-1", 1, "finished"),
        ("analyze-3", 2, "finished"),
        ("analyze-5", 2, "finished"),
        ("analyze-6", 1, "failed"),
    ]
    assert [one.text for one in found[:2]] == [str(QUERY), "glm(ill ~ age)"]


@pytest.mark.parametrize(
    ("now", "last", "state"),
    [
        (101.0, step(2, "share"), "working"),  # the next step is to come
        (999.0, step(2, "share"), "unfinished"),
        (999.0, step(2, "unmask"), "finished"),
        (999.0, step(2, "share", "stopped"), "stopped"),
        (999.0, step(2, "share", "working"), "working"),
    ],
)
def test_a_question_is_over_when_its_last_step_is(now: float, last: Job, state: str) -> None:
    (found,) = questions([step(1, "shape"), last], now)
    assert found.state == state
    assert found.done == 1 + last.ended
