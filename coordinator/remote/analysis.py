"""Queries and methods: `ask(remote, query)`, `ask_method(…)`, for Python and the command line.

A query is a job with a unit for each peer. It continues after a restart of the coordinator, and
peers that have answered are not asked again.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from coordinator.jobs import secure_questions
from coordinator.jobs.analysis import (
    AnalysisResult,
    Merged,
    combine,
    merge_answers,
    result_of,
)
from coordinator.jobs.methods.plans import explain_refusal, follow
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import Statistics
from coordinator.jobs.secure_questions import Answers
from coordinator.jobs.store import JobStore
from coordinator.remote import inference
from coordinator.storage.job_events import JobSpec, SecureStep
from protocols.analytics.mergeable_states import IN_SUMS_ALONE, PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import CommonweightError, UsageError
from protocols.local import homes
from protocols.messages.envelope import strip_controls
from protocols.messages.jobs import QuestionStep

if TYPE_CHECKING:
    from coordinator.jobs.state import Job
    from coordinator.remote.api_client import Remote
    from coordinator.storage.job_events import AnswerInfo

#: Steps of a secure sum after the first take milliseconds.
_STEP_S = 30.0
#: Characters of a method's text that owners see, at most.
_MAX_METHOD = 400
_OWNERS_DECIDE = (
    "each owner decides: commonweight-agent policy set analyze on; the columns that all owners "
    "allow: commonweight analyze columns"
)
_ASK_SECURELY = "ask the same with --secure: these columns were asked about so before"


def start(
    remote: Remote,
    query: Query,
    deadline_s: float,
    peers: Sequence[str] = (),
    method: str = "",
    question: str = "",
) -> str:
    """Start the query for these peers, or all that are online; return the job's id.

    `method`: the text of what asks it, if it is one of several questions; `question`: the id that
    these have in common. Raises CommonweightError.
    """
    encoded = msgspec.json.encode(query).decode()
    return remote.start_job(
        JobSpec(
            kind="analyze",
            query=encoded,
            deadline_s=deadline_s,
            peers=tuple(peers),
            method=method[:_MAX_METHOD],
            question=question,
        )
    )


def ask(
    remote: Remote, query: Query, deadline_s: float = 600.0, *, secure: bool = False
) -> AnalysisResult:
    """The result, once all peers have answered or the deadline has passed.

    `secure`: this machine and the coordinator get the sums over all peers alone.
    """
    if secure:
        merged = _ask_securely(remote, query, (), deadline_s)
        return result_of(query, merged, len(merged.used) + len(merged.left_out))
    return combine(query, *answers_of(inference.wait(remote, start(remote, query, deadline_s))))


def ask_method(
    remote: Remote, method: Method, deadline_s: float = 600.0, *, secure: bool = False
) -> Statistics:
    """The result of a method, which asks several questions, each within `deadline_s`.

    All are answered by the same peers: without one that does not answer a later question, the
    method starts again. What peers have answered before costs nothing then.
    """

    if secure and method.name == "meta":
        raise UsageError("meta shows the estimate of each peer, and --secure hides them")

    asked = secrets.token_hex(8)

    def put(query: Query, peers: Sequence[str]) -> Merged:
        if secure:
            return _ask_securely(remote, query, peers, deadline_s, method.text, asked)
        job = inference.wait(remote, start(remote, query, deadline_s, peers, method.text, asked))
        return merge_answers(*answers_of(job, method.name, may_be_none=bool(peers)))

    names = remote.peer_names()
    return follow(method._replace(peer_names=names), put)


def _ask_securely(
    remote: Remote,
    query: Query,
    peers: Sequence[str],
    deadline_s: float,
    method: str = "",
    question: str = "",
) -> Merged:
    """The sums over these peers, or all that are online. Each step is a job."""
    encoded, asked = msgspec.json.encode(query).decode(), secrets.token_hex(8)

    def put(session: str, step: QuestionStep, of: Mapping[str, bytes] | Sequence[str]) -> Answers:
        requests = tuple(of.values()) if isinstance(of, Mapping) else ()
        if len(set(requests)) == 1:
            requests = requests[:1]
        spec = JobSpec(
            kind="analyze",
            query=encoded,
            deadline_s=deadline_s if step == "shape" else min(deadline_s, _STEP_S),
            peers=tuple(of),
            secure=SecureStep(session=session, step=step, requests=requests),
            method=method[:_MAX_METHOD],
            question=question or asked,
        )
        if isinstance(of, Mapping) and not of:
            return Answers({}, {})
        job = inference.wait(remote, remote.start_job(spec))
        left_out = {peer: strip_controls(explain_refusal(why)) for peer, why in job.excused.items()}
        units = job.units.values()
        found = {unit.only: _body(unit.answer) for unit in units if unit.verified}
        silent = {unit.only: "no answer in time" for unit in units if unit.only not in found}
        return Answers(found, silent | left_out)

    return secure_questions.ask(query, peers, put)


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
            _ASK_SECURELY if IN_SUMS_ALONE in reasons else _OWNERS_DECIDE,
        )
    return answers, [unit.only for unit in units]


def _read(answer: AnswerInfo) -> PeerAnswer:
    """A peer's answer, which the coordinator has checked. Raises CommonweightError."""
    return msgspec.json.decode(_body(answer), type=PeerAnswer)


def _body(answer: AnswerInfo) -> bytes:
    """The bytes of an answer. Raises CommonweightError."""
    body = answer.body
    if not body:  # a long answer is not in the ledger
        if not (homes.home_path("coordinator") / homes.STAMP).exists():
            raise CommonweightError(
                "an answer is too long for other machines", "ask on the coordinator's machine"
            )
        body = JobStore(homes.open_home("coordinator") / "jobs").read_answer(answer)
    return body
