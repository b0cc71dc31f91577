"""What an answer to a unit must be before it counts: signed by whom was asked, whole, to the point.

First it is read, as it comes; what is valid so far is a fact, and then its bytes are looked into.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import msgspec
from flwr.app import ConfigRecord, Message

from coordinator.jobs import analysis
from coordinator.jobs.requests import JobRequest
from coordinator.jobs.state import Job, Unit
from coordinator.jobs.store import JobStore
from coordinator.storage.job_events import Given
from protocols.errors import BadMessage
from protocols.messages import jobs as wire
from protocols.messages.envelope import Verify

ANSWER = "cw.answer"

_names = msgspec.json.Decoder(list[str]).decode
_row = msgspec.json.Decoder(list[Any]).decode


def read(asked: JobRequest, reply: Message, seconds: float, verify: Verify) -> Given:
    """The answer in a reply that is no failure. Raises BadMessage, KeyError, TypeError."""
    record = cast(ConfigRecord, reply.content[ANSWER])
    payload, signature, body = record["answer"], record["signature"], record["body"]
    if not (isinstance(payload, bytes) and isinstance(signature, bytes)):
        raise TypeError("an answer and its signature are bytes")
    answer = wire.SIGNED_ANSWER.decode(payload)
    signed = verify(asked.peer, signature, wire.SIGNED_ANSWER.signed_bytes(payload))
    if answer.peer != asked.peer or not signed:
        raise BadMessage("the answer is not signed by the peer that sent it")
    if answer.key != asked.key:
        raise BadMessage("it answers another question")
    if not isinstance(body, bytes):
        raise TypeError("an answer's body is bytes")
    if body and (len(body), hashlib.sha256(body).hexdigest()) != (answer.nbytes, answer.digest):
        raise BadMessage("the answer's bytes are not those that were signed")
    return Given(
        digest=answer.digest, nbytes=answer.nbytes, rows=answer.rows, seconds=seconds, body=body
    )


def check(job: Job, unit: Unit, given: Given, store: JobStore) -> None:
    """Raise BadMessage unless this can be an answer to the unit's question; OSError."""
    match job.spec.kind:
        case "scatter":
            rows, found = job.rows(unit), _count_rows(store.lines(given))
            if (given.rows, found) != (rows, rows):
                raise BadMessage(f"{found} rows are answered where {rows} were asked for")
        case "private":
            if given.nbytes and not given.body:  # it is read from the ledger
                raise BadMessage("it is longer than any measures of models are")
            pinned = {model.digest for model in job.spec.models}
            if wire.decode_scores(store.read_answer(given)).keys() != pinned:
                raise BadMessage("it does not measure the models that were asked about")
        case "analyze":
            if wrong := analysis.validate_bytes(job.spec.query, store.read_answer(given)):
                raise BadMessage(wrong)


def _count_rows(lines: Iterator[bytes]) -> int:
    """How many rows a table has. Raises BadMessage unless each has a value for every name."""
    rows = 0
    try:
        names = _names(next(lines, b""))
        for rows, line in enumerate(lines, 1):
            if not line.endswith(b"\n") or len(_row(line)) != len(names):
                raise BadMessage(f"row {rows} is not one of {len(names)} values")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"it is no table: {err}") from err
    if not names or len(set(names)) < len(names):
        raise BadMessage("its columns have no names, or the same")
    return rows
