"""Questions of `analyze` as people ask them: each with its steps, which are jobs. Pure.

A method asks several questions, and each secure question has six steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Struct

from coordinator.jobs.messages import job_changed
from coordinator.jobs.state import Job
from coordinator.storage.job_events import JobSpec, JobState
from protocols.analytics.query import Query
from protocols.messages.envelope import JobChanged, Text, strip_controls

#: A secure question ends with this step.
_LAST_STEP = "unmask"
#: The longest time between two steps, in which the machine that asks computes.
_BETWEEN_S = 60.0


class Question(Struct, frozen=True, kw_only=True):
    """A question: `text` as it was asked, and its steps, the oldest first.

    `state`: "working" while a step runs or further ones are to come, "unfinished" if none came,
    else that of the last step.
    """

    job: Text
    text: Text
    state: Text
    because: Text
    steps: list[JobChanged]

    @property
    def done(self) -> int:
        """How many steps have ended."""
        return sum(step.state != JobState.WORKING for step in self.steps)


def questions(jobs: Iterable[Job], now: float) -> list[Question]:
    """The questions that these jobs are steps of, in the order of their first ones; `now`: Unix s.

    The job of a question is its newest one, which `analyze stop` ends.
    """
    steps: dict[str, list[Job]] = {}
    for job in jobs:
        steps.setdefault(_name(job), []).append(job)
    return [_question(of, now) for of in steps.values()]


def _name(job: Job) -> str:
    """What the steps of a question have in common. Older jobs do not name it."""
    spec = job.spec
    return spec.question or (f"sum {spec.secure.session}" if spec.secure else f"job {job.id}")


def _question(steps: list[Job], now: float) -> Question:
    last = steps[-1]
    return Question(
        job=last.id,
        text=strip_controls(_text(last.spec)),
        state=_state(steps, now),
        because=strip_controls(last.ended_because),
        steps=[job_changed(job) for job in steps],
    )


def _state(steps: list[Job], now: float) -> str:
    last = steps[-1]
    if any(not job.ended for job in steps):
        return JobState.WORKING
    secure = last.spec.secure
    if last.state is not JobState.FINISHED or secure is None or secure.step == _LAST_STEP:
        return last.state
    return JobState.WORKING if now - last.ended_at < _BETWEEN_S else "unfinished"


def _text(spec: JobSpec) -> str:
    if spec.method:
        return spec.method
    try:
        return str(msgspec.json.decode(spec.query, type=Query))
    except msgspec.DecodeError:  # of another version
        return "–"
