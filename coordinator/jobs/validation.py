"""Validates the answers to units, in two steps.

`read_answer` checks the signature of a reply; its answer is then recorded. `check` looks into the
bytes of a recorded answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
from flwr.app import ConfigRecord, Message

from coordinator.jobs import analysis
from coordinator.jobs.requests import JobRequest
from coordinator.jobs.state import Job, Unit
from coordinator.jobs.store import MAX_ANSWER_BYTES, JobStore
from coordinator.storage.job_events import AnswerInfo
from protocols.errors import BadMessage
from protocols.messages import jobs as wire
from protocols.messages.decoding import MALFORMED
from protocols.messages.envelope import Verify

ANSWER = "cw.answer"
#: The most bytes of an answer to a step of a secure question.
MAX_SECURE_BYTES = 2 << 20

_names = msgspec.json.Decoder(list[str]).decode
_row = msgspec.json.Decoder(list[Any]).decode


def read_answer(
    request: JobRequest,
    reply: Message,
    seconds: float,
    verify: Verify,
    check_fleet: Callable[[str, str], None],
) -> AnswerInfo:
    """The answer in a reply without an error. Raises BadMessage, KeyError, TypeError.

    `check_fleet(peer, named)` raises BadMessage if the answer is for another fleet.
    """
    record = cast(ConfigRecord, reply.content[ANSWER])
    payload, signature, body = record["answer"], record["signature"], record["body"]
    if not (isinstance(payload, bytes) and isinstance(signature, bytes)):
        raise TypeError("an answer and its signature are bytes")
    answer = wire.SIGNED_ANSWER.decode(payload)
    signed = verify(request.peer, signature, wire.SIGNED_ANSWER.signed_bytes(payload))
    if answer.peer != request.peer or not signed:
        raise BadMessage("the answer is not signed by the peer that sent it")
    check_fleet(request.peer, answer.fleet)
    if answer.key != request.key:
        raise BadMessage("it answers another request")
    if not isinstance(body, bytes):
        raise TypeError("an answer's body is bytes")
    if body and (len(body), hashlib.sha256(body).hexdigest()) != (answer.nbytes, answer.digest):
        raise BadMessage("the answer's bytes are not those that were signed")
    return AnswerInfo(
        digest=answer.digest, nbytes=answer.nbytes, rows=answer.rows, seconds=seconds, body=body
    )


def check_size(job: Job, answer: AnswerInfo) -> None:
    """Raise BadMessage if the answer is longer than one to this question can be."""
    match job.spec.kind:
        case "scatter":
            most = MAX_ANSWER_BYTES
        case "private":  # only the ledger's copy is used
            most = wire.INLINE_MAX_BYTES
        case "analyze":
            most = MAX_SECURE_BYTES if job.spec.secure else analysis.max_bytes(job.spec.query)
    if answer.nbytes > most:
        raise BadMessage(f"it is too long: {answer.nbytes:,} bytes, and at most {most:,} can be")


def check(job: Job, unit: Unit, answer: AnswerInfo, store: JobStore) -> None:
    """Raise BadMessage unless the answer fits the unit; OSError if it cannot be read."""
    check_size(job, answer)
    match job.spec.kind:
        case "scatter":
            rows, found = job.rows(unit), _count_rows(store.lines(answer))
            if (answer.rows, found) != (rows, rows):
                raise BadMessage(f"{found} rows are answered, and the unit has {rows}")
        case "private":
            if answer.nbytes and not answer.body:  # only the ledger's copy is used
                raise BadMessage("the scores are too long")
            pinned = {model.digest for model in job.spec.models}
            if wire.decode_scores(store.read_answer(answer)).keys() != pinned:
                raise BadMessage("it does not have the scores of the requested models")
        case "analyze" if job.spec.secure is not None:
            pass  # the program that asks checks each step of the sum
        case "analyze":
            if wrong := analysis.validate_bytes(job.spec.query, store.read_answer(answer)):
                raise BadMessage(wrong)


def _count_rows(lines: Iterator[bytes]) -> int:
    """The number of rows of a table. Raises BadMessage unless each has a value for every name."""
    rows = 0
    try:
        names = _names(next(lines, b""))
        for rows, line in enumerate(lines, 1):
            if not line.endswith(b"\n") or len(_row(line)) != len(names):
                raise BadMessage(f"row {rows} does not have {len(names)} values")
    except MALFORMED as err:
        raise BadMessage(f"it is not a table: {err}") from err
    if not names or len(set(names)) < len(names):
        raise BadMessage("its column names are missing or not unique")
    return rows
