"""Queries and methods: `ask(remote, query)`, `ask_method(…)`, for Python and the command line.

A query is a job with a unit for each peer. It continues after a restart of the coordinator, and
peers that have answered are not asked again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from coordinator.jobs.analysis import AnalysisResult, Merged, combine, merge_answers
from coordinator.jobs.methods.plans import explain_refusal, follow
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import Statistics
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


def start(remote: Remote, query: Query, deadline_s: float, peers: Sequence[str] = ()) -> str:
    """Start the query for these peers, or all that are online; return the job's id.

    Raises CommonweightError.
    """
    encoded = msgspec.json.encode(query).decode()
    return remote.start_job(
        JobSpec(kind="analyze", query=encoded, deadline_s=deadline_s, peers=tuple(peers))
    )


def ask(remote: Remote, query: Query, deadline_s: float = 600.0) -> AnalysisResult:
    """The result, once all peers have answered or the deadline has passed."""
    return combine(query, *answers_of(_wait(remote, start(remote, query, deadline_s))))


def ask_method(remote: Remote, method: Method, deadline_s: float = 600.0) -> Statistics:
    """The result of a method, which asks several questions, each within `deadline_s`.

    All are answered by the same peers: without one that does not answer a later question, the
    method starts again. What peers have answered before costs nothing then.
    """

    def put(query: Query, peers: Sequence[str]) -> Merged:
        job = _wait(remote, start(remote, query, deadline_s, peers))
        return merge_answers(*answers_of(job, method.name, may_be_none=bool(peers)))

    names = {peer["peer"]: peer["name"] for peer in remote.peers()}
    return follow(method._replace(peer_names=names), put)


def _wait(remote: Remote, job_id: str) -> Job:
    """The job, once it has ended."""
    while (job := remote.job(job_id)).state is JobState.WORKING:
        time.sleep(_POLL_S)
    return job


def answers_of(
    job: Job, method: str = "", *, may_be_none: bool = False
) -> tuple[dict[str, PeerAnswer], list[str]]:
    """The answers of a job by peer, and the peers that were asked. `method`: what asks, if any.

    Raises CommonweightError if no peer has answered, unless that may be.
    """
    refused = {
        peer: PeerAnswer(refused=strip_controls(explain_refusal(why, method)))
        for peer, why in job.excused.items()
    }
    units = job.units.values()
    answers = refused | {unit.only: _read(unit.answer) for unit in units if unit.verified}
    if not may_be_none and all(answer.refused for answer in answers.values()):
        reasons = "; ".join({one.refused: None for one in answers.values()}) or job.ended_because
        raise CommonweightError(
            f"no peer has answered: {reasons or 'no answer in time'}",
            "each owner decides: commonweight-agent policy set analyze on",
        )
    return answers, [unit.only for unit in units]


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
