"""What a lying coordinator or peer answers costs a bounded amount of memory and time."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from agent.transport import http_client
from agent.transport.coordinator_client import CoordinatorClient
from coordinator.fleet import state
from coordinator.fleet.state import Fleet
from coordinator.remote import access, version_files
from coordinator.remote.access import Access, ConnectionInfo
from coordinator.remote.api_client import Remote
from protocols.enrollment import certificates, identity
from protocols.enrollment.tickets import new_ticket
from protocols.errors import BadMessage, CommonweightError, Refused, Unreachable
from protocols.local import join_client
from protocols.local.join_client import find_coordinator, post_join
from protocols.messages.envelope import LogResponse
from protocols.messages.mqtt import MqttAddress
from protocols.p2p.swarm import DownloadPlanRequest
from tests.hostile.tools import LyingCoordinator
from tests.support.https_site import Machine

pytestmark = pytest.mark.attack("20.10")

MB = 1_000_000
#: What the server is ready to send, and what a client may hold of it.
ENDLESS_MB, MOST_MB = 32, 8
BOMB = gzip.compress(bytes(ENDLESS_MB * MB))
OK = b"HTTP/1.1 200 OK\r\n"

Send = Callable[[bytes], None]


def long_body(head: bytes, send: Send) -> None:
    """As long as it says."""
    send(OK + f"content-length: {ENDLESS_MB * MB}\r\n\r\n".encode())
    for _ in range(ENDLESS_MB):
        send(b"x" * MB)


def endless_body(head: bytes, send: Send) -> None:
    """Without a length, until the connection closes."""
    send(OK + b"connection: close\r\n\r\n")
    for _ in range(ENDLESS_MB):
        send(b"x" * MB)


def huge_file(head: bytes, send: Send) -> None:
    """More than any disk has, so that none of it is to be written."""
    send(OK + b"content-length: 900000000000000\r\n\r\n" + b"x" * MB)


def endless_chunks(head: bytes, send: Send) -> None:
    send(OK + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(ENDLESS_MB):
        send(f"{MB:x}\r\n".encode() + b"x" * MB + b"\r\n")


def tiny_chunks(head: bytes, send: Send) -> None:
    send(OK + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(10):
        send(b"1\r\nx\r\n" * 4096)


def bomb(head: bytes, send: Send) -> None:
    """1000 times smaller than what it unpacks to; a client that reads it must not unpack it."""
    send(OK + f"content-encoding: gzip\r\ncontent-length: {len(BOMB)}\r\n\r\n".encode() + BOMB)


def endless_refusal(head: bytes, send: Send) -> None:
    send(b"HTTP/1.1 403 Forbidden\r\nconnection: close\r\n\r\n")
    for _ in range(ENDLESS_MB):
        send(b"x" * MB)


def many_headers(head: bytes, send: Send) -> None:
    send(OK)
    for number in range(ENDLESS_MB * 4):
        send(f"h{number}: {'x' * 60_000}\r\n".encode() * 4)
    send(b"content-length: 2\r\n\r\n{}")


ANSWERS = [
    *(long_body, endless_body, endless_chunks, tiny_chunks, bomb, endless_refusal, many_headers)
]


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[LyingCoordinator]:
    with LyingCoordinator(tmp_path / "liar", long_body).up() as made:
        yield made


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Fail if this process holds more than MOST_MB at any time in the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MB * MB
    finally:
        tracemalloc.stop()


def agent_requests(link: CoordinatorClient, folder: Path) -> dict[str, Callable[[], object]]:
    """Every request of an agent that reads a whole response."""
    update = folder / "update"
    update.write_bytes(b"u" * 100)
    return {
        "open": link.open,
        "check": link.check,
        "pull": link.pull,
        "status": link.enrollment_status,
        "broker": link.mqtt_address,
        "leave": link.leave,
        "renew": link.renew,
        "logs": lambda: link.send_logs(LogResponse(request_id="a", lines=[])),
        "neighbors": lambda: link.neighbors(DownloadPlanRequest()),
        "upload": lambda: link.upload("0" * 64, update),
    }


NAMES = [
    "open",
    "check",
    "pull",
    "status",
    "broker",
    "leave",
    "renew",
    "logs",
    "neighbors",
    "upload",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_agent_reads_no_more_than_an_honest_answer_has(
    liar: LyingCoordinator, tmp_path: Path, name: str
) -> None:
    """Attack: a coordinator answers a request with hundreds of megabytes."""
    link = CoordinatorClient(liar.credentials(Machine()))
    with little_memory(), pytest.raises(Unreachable, match="has more than"):
        agent_requests(link, tmp_path)[name]()
    link.close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_agent_reads_little_of_any_kind_of_body(
    liar: LyingCoordinator, answer: Callable[[bytes, Send], None]
) -> None:
    """Attack: a body without a length, in chunks, compressed, in a refusal, or headers."""
    liar.answer = answer
    link = CoordinatorClient(liar.credentials(Machine()))
    with little_memory(), pytest.raises(CommonweightError):
        link.enrollment_status()
    link.close()


@pytest.fixture
def operator(
    liar: LyingCoordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Remote]:
    """A client of the liar, with an access in `tmp_path`."""
    monkeypatch.setattr("coordinator.remote.api_client.MAX_RESPONSE_BYTES", 1 * MB)
    joined = Access(
        operator="operator",
        role="operator",
        fleet=liar.fleet,
        addresses=(liar.address,),
        ca_pem=liar.ca_pem.decode(),
    )
    info = ConnectionInfo(joined, identity.new_signing_key())
    monkeypatch.setattr(access, "connection_info", lambda home: info)
    (tmp_path / access.ACCESS_FILE).touch()
    remote = Remote(tmp_path)
    yield remote
    remote.close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_operator_reads_little_of_any_kind_of_body(
    liar: LyingCoordinator, operator: Remote, answer: Callable[[bytes, Send], None]
) -> None:
    """Attack: the same against a monitor, and against somebody who joins."""
    liar.answer = answer
    ticket = new_ticket((liar.address,), certificates.ca_fingerprint(liar.ca_pem))
    with little_memory():
        for ask in (
            operator.fleet,
            lambda: find_coordinator(ticket),
            lambda: post_join(liar.address, liar.ca_pem, "/x", MqttAddress(host="h", port=1), dict),
        ):
            with pytest.raises((Unreachable, Refused)):
                ask()


@pytest.mark.parametrize("answer", [*ANSWERS, huge_file])
def test_an_operator_stores_no_file_of_any_kind_of_body(
    liar: LyingCoordinator,
    operator: Remote,
    answer: Callable[[bytes, Send], None],
    tmp_path: Path,
) -> None:
    """Attack: the same where a version was asked for, or more bytes than the disk has."""
    liar.answer = answer
    with little_memory(), pytest.raises(CommonweightError):
        version_files.find(operator, "r", "0" * 64)
    assert not list((tmp_path / version_files.FOLDER).iterdir())


def dripping(head: bytes, send: Send) -> None:
    """A byte now and then, so that no timeout of a single step ends it."""
    send(OK + b"content-length: 1000\r\n\r\n")
    for _ in range(1000):
        send(b"x")
        time.sleep(0.05)


def endless_continue(head: bytes, send: Send) -> None:
    while True:
        send(b"HTTP/1.1 100 Continue\r\n\r\n" * 10)


@pytest.mark.parametrize("answer", [dripping, endless_continue])
def test_a_request_of_an_agent_ends_in_time(
    liar: LyingCoordinator,
    answer: Callable[[bytes, Send], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attack: an answer that never ends holds an agent's thread for ever."""
    liar.answer = answer
    monkeypatch.setattr(http_client, "REQUEST_WITHIN_S", 0.5)
    link = CoordinatorClient(liar.credentials(Machine()))
    with pytest.raises(Unreachable, match="did not end within"):
        link.enrollment_status()
    link.close()


def test_a_request_of_an_operator_ends_in_time(
    liar: LyingCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a dripping answer holds somebody who joins."""
    liar.answer = dripping
    monkeypatch.setattr(join_client, "_TIMEOUT_S", 0.5)
    ticket = new_ticket((liar.address,), certificates.ca_fingerprint(liar.ca_pem))
    with pytest.raises(Unreachable, match=r"in time|takes longer"):
        find_coordinator(ticket)
    with pytest.raises(Unreachable, match=r"in time|takes longer"):
        post_join(liar.address, liar.ca_pem, "/x", MqttAddress(host="h", port=1), dict)


def test_honest_answers_keep_the_connection(liar: LyingCoordinator, tmp_path: Path) -> None:
    """Control: a response of exactly the limit is read whole, and a cut one is refused."""
    body = b"y" * http_client.MAX_RESPONSE_BYTES
    liar.answer = lambda head, send: send(
        OK + f"content-length: {len(body)}\r\n\r\n".encode() + body
    )
    link = CoordinatorClient(liar.credentials(Machine()))
    assert link.renew() == body
    liar.answer = lambda head, send: send(OK + b"content-length: 100\r\n\r\n" + b"y" * 99)
    with pytest.raises(Unreachable):
        link.renew()
    assert httpx.Response(200, content=body).content == body
    link.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"at": 1e300},
        {"events": [{"at": -1e18, "level": "info", "text": "x"}]},
        {"events": [{"at": 0.0, "level": "info", "text": "x"}] * 5000},
        {"seq": 10**400},
        {"name": "x" * 10_000},
        {"peers": {str(number): {} for number in range(70_000)}},
    ],
    ids=["a date", "an event", "events", "digits", "a name", "peers"],
)
def test_a_monitor_takes_no_state_of_a_fleet_without_bounds(changes: dict[str, Any]) -> None:
    """Attack: a coordinator sends a state whose dates, numbers or lists end the monitor."""
    told = msgspec.json.decode(state.encode(Fleet(fleet="f"), 0.0)) | changes
    with pytest.raises(BadMessage):
        state.decode(json.dumps(told).encode())
