"""Units of jobs and their answers count in the fleet that they name, and in no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from agent.clientapp.interfaces import PeerIdentity
from agent.clientapp.jobs import ANSWER, Jobs, Result
from coordinator.jobs import validation
from coordinator.jobs.requests import JobRequest
from coordinator.storage.job_events import AnswerInfo
from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.messages import jobs
from protocols.messages.fleet_names import FleetNames
from protocols.messages.jobs import SIGNED_UNIT, Private, Unit

COORDINATOR, PEER = identity.new_signing_key(), identity.new_signing_key()
ME = identity.peer_id(identity.public_bytes(PEER))
OURS, OTHER = "f" * 16, "0" * 16


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3


def _agent(folder: Path, fleet: str = OURS) -> Jobs:
    me = PeerIdentity(ME, PEER.sign, identity.public_bytes(COORDINATOR), fleet)
    return Jobs(
        me,
        folder,
        send=lambda digest, path: None,
        handlers={Private: lambda unit: Result(b"{}", 0)},
    )


def _request(fleet: str, number: int = 0) -> tuple[Message, JobRequest]:
    unit = Unit(job="j", unit=number, question=Private(min_group=1), fleet=fleet)
    payload, signature = SIGNED_UNIT.seal(unit, COORDINATOR.sign)
    content = RecordDict({"unit": ConfigRecord({"unit": payload, "signature": signature})})
    key = jobs.idempotency_key(payload)
    return Message(content, 9, "query.infer"), JobRequest(number, ME, key, 60.0)


def _read(request: JobRequest, record: ConfigRecord, names: FleetNames) -> AnswerInfo:
    reply = Message(RecordDict({ANSWER: record}), 9, "query.infer")

    def verify(peer: str, signature: bytes, signed: bytes) -> bool:
        return identity.verify(identity.public_bytes(PEER), signature, signed)

    return validation.read_answer(request, reply, 1.0, verify, names.check)


@pytest.mark.attack("20.13", by="coordinator")
def test_a_unit_for_another_fleet_is_not_done(tmp_path: Path) -> None:
    """Attack: have an agent do a unit that was signed for another fleet, or for none as before."""
    agent = _agent(tmp_path)
    agent.answer(_request("")[0])  # of an older coordinator
    with pytest.raises(BadMessage, match="is signed for fleet 0000"):
        agent.answer(_request(OTHER)[0])
    agent.answer(_request(OURS, 1)[0])
    with pytest.raises(BadMessage, match="names no fleet"):
        agent.answer(_request("", 2)[0])


@pytest.mark.attack("20.13", by="peer")
def test_an_answer_for_another_fleet_does_not_count(tmp_path: Path) -> None:
    """Attack: send an answer that was signed for another fleet, or as an older version signs."""
    names = FleetNames(OURS)
    message, request = _request(OURS)
    record: Any = _agent(tmp_path).answer(message)[ANSWER]
    assert _read(request, record, names).nbytes == 2
    answer = jobs.SIGNED_ANSWER.decode(record["answer"])
    for fleet, wrong in ((OTHER, "is signed for fleet"), ("", "names no fleet")):
        changed = msgspec.structs.replace(answer, fleet=fleet)
        payload, signature = jobs.SIGNED_ANSWER.seal(changed, PEER.sign)
        other = ConfigRecord({**record, "answer": payload, "signature": signature})
        with pytest.raises(BadMessage, match=wrong):
            _read(request, other, names)
    older = ConfigRecord({**record, "answer": payload, "signature": signature})
    assert _read(request, older, FleetNames(OURS)).nbytes == 2
