"""Queries to all peers: `ask(remote, query)`, for Python and the command line.

A query is a job with a unit for each peer. It continues after a restart of the coordinator, and
peers that have answered are not asked again.
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


def start(remote: Remote, query: Query, deadline_s: float) -> str:
    """Start the query for all online peers; return the job's id. Raises CommonweightError."""
    encoded = msgspec.json.encode(query).decode()
    return remote.start_job(JobSpec(kind="analyze", query=encoded, deadline_s=deadline_s))


def ask(remote: Remote, query: Query, deadline_s: float = 600.0) -> AnalysisResult:
    """The result, once all peers have answered or the deadline has passed."""
    job_id = start(remote, query, deadline_s)
    while (job := remote.job(job_id)).state is JobState.WORKING:
        time.sleep(_POLL_S)
    return result_of(job, query)


def result_of(job: Job, query: Query) -> AnalysisResult:
    """The result of a job. Raises CommonweightError if no peer has answered."""
    refused = {peer: PeerAnswer(refused=strip_controls(why)) for peer, why in job.excused.items()}
    units = job.units.values()
    answers = refused | {unit.only: _read(unit.answer) for unit in units if unit.verified}
    result = combine(query, answers, [unit.only for unit in units])
    if not result.peers:
        reasons = "; ".join(dict.fromkeys(result.left_out.values())) or job.ended_because
        raise CommonweightError(
            f"no peer has answered: {reasons}",
            "each owner decides: commonweight-agent policy set analyze on",
        )
    return result


def _read(answer: AnswerInfo) -> PeerAnswer:
    """A peer's answer, which the coordinator has checked. Raises CommonweightError."""
    body = answer.body
    if not body:  # a long answer is not in the ledger
        if not (homes.home_path("coordinator") / homes.STAMP).exists():
            raise CommonweightError(
                "an answer is too long for other machines", "ask on the coordinator's machine"
            )
        body = JobStore(homes.open_home("coordinator") / "jobs").read_answer(answer)
    return msgspec.json.decode(body, type=PeerAnswer)
