"""Asking the fleet: `ask(remote, "count, mean(age) by sex")`, from Python or the command line.

A question is a job with a unit for each peer: it survives the coordinator's death, and who has
answered is not asked again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from coordinator.jobs.analysis import AnalysisResult, combine
from coordinator.jobs.store import JobStore
from coordinator.storage.job_events import JobSpec, JobState
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import CommonweightError
from protocols.local import homes
from protocols.messages.envelope import strip_controls

if TYPE_CHECKING:
    from coordinator.jobs.state import Job
    from coordinator.remote.api_client import Remote
    from coordinator.storage.job_events import AnswerInfo

_POLL_S = 0.2


def start(remote: Remote, question: Query, deadline_s: float) -> str:
    """Ask all peers that are there; the job's id. Raises CommonweightError."""
    query = msgspec.json.encode(question).decode()
    return remote.start_job(JobSpec(kind="analyze", query=query, deadline_s=deadline_s))


def ask(remote: Remote, question: Query, deadline_s: float = 600.0) -> AnalysisResult:
    """The fleet's answer, once all peers have told or the deadline has passed."""
    job_id = start(remote, question, deadline_s)
    while (job := remote.job(job_id)).state is JobState.WORKING:
        time.sleep(_POLL_S)
    return result_of(job, question)


def result_of(job: Job, question: Query) -> AnalysisResult:
    """What a job's peers have told together. Raises CommonweightError if none has."""
    told: dict[str, PeerAnswer] = {}
    for unit in job.units.values():
        if unit.verified:
            told[unit.only] = _read(unit.answer)
    for peer, reason in job.excused.items():
        told.setdefault(peer, PeerAnswer(refused=strip_controls(reason)))
    found = combine(question, told, [unit.only for unit in job.units.values()])
    if not found.peers:
        reasons = "; ".join(dict.fromkeys(found.left_out.values())) or job.ended_because
        raise CommonweightError(
            f"no peer has answered: {reasons}",
            "each owner decides: commonweight-agent policy set analyze on",
        )
    return found


def _read(given: AnswerInfo) -> PeerAnswer:
    """A peer's answer, which the coordinator has checked. Raises CommonweightError."""
    body = given.body
    if not body:  # a long one is not in the ledger
        if not (homes.home_path("coordinator") / homes.STAMP).exists():
            raise CommonweightError(
                "an answer is too long to be shown elsewhere", "ask on the coordinator's machine"
            )
        body = JobStore(homes.open_home("coordinator") / "jobs").read_answer(given)
    return msgspec.json.decode(body, type=PeerAnswer)
