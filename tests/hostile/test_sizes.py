"""Lying lengths, endless heads, garbage: the server stays up, small, and leaves nothing lying."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Message

from agent.clientapp.app import Client
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.data.settings import DataSettings
from agent.home import enrollment_file
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.trainer.process import TrainerProcess, trainer_program
from agent.trainer.retry import RetryingTrainer
from agent.transport.coordinator_client import CoordinatorClient
from coordinator.transport.upload_limits import MAX_UPLOADS
from protocols.enrollment import signed_requests
from protocols.messages.work import POLL_PATH, Work
from tests.hostile.tools import answer_to, bounded_growth, files_in, plain, secure
from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.attack("20.wire", by="stranger")

MOST_GROWTH_MB = 64


class NoWeights(Transport):
    """The transport of a client that only describes: no version comes, no update goes."""

    def fetch(self, work: Work) -> Path:
        raise AssertionError("a description needs no version")

    def send(self, digest: str, path: Path) -> None:
        raise AssertionError("a description is no upload")


class Target:
    """A running coordinator, and the keys of a member of its fleet that turned rogue."""

    def __init__(self, site: Fleet) -> None:
        self.site = site
        site.up()
        site.join("eve")
        up = json.loads((site.home / "up.json").read_bytes())
        self.pid: int = up["pid"]
        self.port = int(up["address"].rpartition(":")[2])
        self.home = site.folder / "eve"
        self.enrollment: Enrollment = enrollment_file.read_enrollment(self.home)
        self.mine = Credentials.load(self.home, self.enrollment)
        self.ca_pem = self.enrollment.ca_pem
        self.link = CoordinatorClient(self.mine)
        self.link.open()

    def send(self, data: bytes, timeout_s: float = 20.0) -> bytes:
        """What the server answers to these bytes over TLS."""
        sock = secure(self.port, self.ca_pem, timeout_s)
        try:
            return answer_to(sock, data)
        finally:
            sock.close()

    def head(
        self, method: str, path: str, headers: dict[str, str], *, digest: str = "", end: str = ""
    ) -> bytes:
        signed = self.mine.sign_request(method, path, digest or signed_requests.EMPTY_SHA256)
        lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close"]
        lines += [f"{name}: {value}" for name, value in (signed | headers).items()]
        return "\r\n".join([*lines, end, ""]).encode()

    def described(self, question: Message) -> Message:
        """An honest answer to the first question of a run."""
        trainer = RetryingTrainer(TrainerProcess(trainer_program(self.home), DataSettings()))
        coordinator_public, fleet = self.enrollment.coordinator_public, self.enrollment.fleet
        me = PeerIdentity(self.mine.peer, self.mine.sign_key.sign, coordinator_public, fleet)
        client = Client(
            me,
            trainer,
            NoWeights(),
            Outbox(self.home, me),
            OwnerRules(lambda: AgentSettings(tasks=("*",))),
        )
        try:
            return client.handle(question)
        finally:
            trainer.close()

    def is_well(self) -> bool:
        """An honest request is served."""
        self.link.heartbeat()
        return self.link.pull() is None


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with fleet(tmp_path_factory.mktemp("sizes")) as site:
        made = Target(site)
        yield made
        made.link.close()


@pytest.fixture(autouse=True)
def _well(target: Target) -> Iterator[None]:
    """After every attack the server lives and serves, has not grown, and has raised nothing."""
    said = len(target.site.programs["up"].log)
    name = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2]
    with bounded_growth(target.pid, MOST_GROWTH_MB, name):
        yield
        assert target.is_well()
    log = target.site.programs["up"].log[said:]
    assert "Traceback" not in log
    assert "Exception in ASGI" not in log


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


#: What ends a connection without a word, or with one of these.
REFUSED = {0, 400, 401, 403, 404, 405, 410, 411, 413, 422}


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": "10"},
        {"content-length": "10000000000"},
        {"content-length": "999999999999999"},
        {"content-length": "99999999999999999999999999"},
        {"content-length": "-1"},
        {"content-length": "1e3"},
        {"content-length": "5, 5"},
        {"content-length": ""},
        {"transfer-encoding": "chunked"},
        {"transfer-encoding": "chunked", "content-length": "10"},
        {"transfer-encoding": "gzip, chunked"},
        {"expect": "100-continue", "content-length": "10000000000"},
        {"content-length": "5", "content-encoding": "gzip"},
        {"upgrade": "websocket", "connection": "upgrade"},
        {"upgrade": "h2c", "connection": "upgrade, http2-settings", "http2-settings": "AAAA"},
        {"range": "bytes=0-0," * 3000 + "0-0"},
        {"x-cw-offset": "-1", "content-length": "5"},
        {"x-cw-offset": "999999999999999", "content-length": "5"},
    ],
)
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_lying_length_is_refused(target: Target, headers: dict[str, str], method: str) -> None:
    """Attack: announce another length of a body than the one that is sent."""
    digest = hashlib.sha256(b"x").hexdigest()
    path = f"/cw/v1/updates/{digest}" if method == "PUT" else POLL_PATH
    for signed_digest in (digest, signed_requests.EMPTY_SHA256):
        head = target.head(method, path, headers, digest=signed_digest)
        for body in (b"", b"x" * 20, b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\nx"):
            sock = secure(target.port, target.ca_pem, timeout_s=0.2)
            answer = answer_to(sock, head + body)
            sock.close()
            assert status(answer) in REFUSED | {100}, answer
    wait_for(lambda: not parts(target), "nothing is left of a refused upload")


def parts(target: Target) -> list[str]:
    return [path.name for path in files_in(target.site.home / "spool")]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 60_000 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"x" * 1_000_000,
        b"GET / HTTP/1.1\r\nx: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"z" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
        b"G" * 1_000_000,
        b"\r\n" * 500_000,
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 20_000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"GET http://x HTTP/1.1\r\n\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n",
        b"GET /%00%0a%1b[31m HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\nhost: x\nconnection: close\n\n",
        os.urandom(100_000),
        b"\x00" * 100_000,
        b"POST /cw/v1/join HTTP/1.1\r\ncontent-length: 16000\r\n\r\n" + b"[" * 16_000,
        b"POST /cw/v1/join HTTP/1.1\r\ncontent-length: 10\r\nconnection: close\r\n\r\n"
        + b"\xff" * 10,
    ],
    ids=range(24),
)
def test_a_strange_head_is_refused(target: Target, data: bytes) -> None:
    """Attack: send endless, malformed and random heads of requests."""
    began = time.monotonic()
    answer = target.send(data, timeout_s=1.5)
    took = time.monotonic() - began
    print(f"{data[:30]!r}: {answer[:60]!r} after {took:.2f} s")
    assert status(answer) in REFUSED


def test_pipelined_requests_are_answered_in_order_or_cut_off(target: Target) -> None:
    """Attack: send several requests at once, to get the answer to another one."""
    good = b"GET /cw/v1/ca HTTP/1.1\r\nhost: x\r\n\r\n"
    end = b"GET /cw/v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n"
    answer = target.send(good * 5 + end + good)
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"BEGIN CERTIFICATE") == 5
    assert answer.count(b"HTTP/1.1 404") == 1
    assert answer.rindex(b"404") > answer.rindex(b"200"), "after a refusal nothing is answered"


def test_no_tls_is_no_answer(target: Target) -> None:
    """Attack: speak without TLS, or with a malformed handshake."""
    for data in (
        b"GET /cw/v1/ca HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + os.urandom(70_000),
        b"\x16\x03\x01\x00\x05\x01\x00\xff\xff\xff",
        b"\x80\x2e\x01\x00\x02" + b"\x00" * 50,
        os.urandom(5000),
    ):
        sock = plain(target.port, 1.0)
        answer = answer_to(sock, data)
        sock.close()
        assert b"HTTP" not in answer
        assert len(answer) < 100


def test_a_stranger_makes_nobody_read_his_body(target: Target) -> None:
    """Attack: send 200 MB after a request that is refused by its head."""
    head = b"POST /cw/v1/exchange HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000000\r\n\r\n"
    socks = [secure(target.port, target.ca_pem) for _ in range(8)]
    for sock in socks:
        sock.sendall(head)
        assert sock.recv(4096).startswith(b"HTTP/1.1 401")
    for sock in socks:
        with contextlib.suppress(OSError):  # it may be cut off meanwhile
            for _ in range(25):
                sock.sendall(bytes(1_000_000))
    for sock in socks:
        sock.close()


@pytest.mark.attack("20.wire", by="peer")
def test_a_member_cannot_fill_the_disk_or_memory(target: Target) -> None:
    """Attack: upload without end, each time another digest, whole or cut off."""
    # A run that waits for its first weights takes uploads of any size.
    run = target.site.start_run("ping", "--rounds", "1", "--quorum", "1", "--deadline", "300s")
    question = wait_for(target.link.pull, "it is asked what it would train")
    message = target.link.exchange(target.described(question))
    message = message or wait_for(target.link.pull, "it is asked for first weights")
    try:
        codes = []
        for number in range(12):
            body = b"x" * 50_000 + str(number).encode()
            digest = hashlib.sha256(body).hexdigest()
            path = f"/cw/v1/updates/{digest}"
            head = target.head("PUT", path, {"content-length": str(len(body))}, digest=digest)
            codes.append(status(target.send(head + body)))
        assert codes == [200] * 12
        assert len(parts(target)) == MAX_UPLOADS, "a further one replaces the oldest"
        for number in range(12):
            digest = hashlib.sha256(str(number).encode()).hexdigest()
            path = f"/cw/v1/updates/{digest}"
            head = target.head("PUT", path, {"content-length": "1000000"}, digest=digest)
            sock = secure(target.port, target.ca_pem)
            sock.sendall(head + b"x" * 10_000)
            sock.close()
        assert len([name for name in parts(target) if name.endswith(".part")]) <= 1
        assert len(parts(target)) <= MAX_UPLOADS + 1
        for path in files_in(target.site.home / "spool"):
            assert path.stat().st_mode & 0o077 == 0
    finally:
        assert message is not None
        target.site.ask("run", "stop", run)


@pytest.mark.long
def test_a_slow_sender_is_shown_the_door(target: Target) -> None:
    """Attack: send a byte a second, in a head, in a body and in a TLS handshake."""
    digest = hashlib.sha256(b"x").hexdigest()
    body_head = target.head("POST", POLL_PATH, {"content-length": "100000"}, digest=digest)
    in_head = secure(target.port, target.ca_pem)
    in_body = secure(target.port, target.ca_pem)
    silent = secure(target.port, target.ca_pem)
    handshake = plain(target.port)
    in_body.sendall(body_head)
    slow = {
        "head": (in_head, b"GET / HTTP/1.1\r\nx: " + b"y" * 1000),
        "body": (in_body, b"z" * 1000),
        "silent": (silent, b""),
        "handshake": (handshake, b"\x16\x03\x01\x02\x00\x01" + b"\0" * 500),
    }
    began, ended = time.monotonic(), {}
    number = 0

    def all_ended() -> bool:
        nonlocal number
        now = time.monotonic()
        if now - began >= number:
            for name, (sock, data) in slow.items():
                if name not in ended and number < len(data):
                    try:
                        sock.sendall(data[number : number + 1])
                    except OSError:
                        ended[name] = now - began
            number += 1
        for name, (sock, _) in slow.items():
            if name not in ended and is_closed(sock):
                ended[name] = now - began
        return len(ended) == len(slow)

    wait_for(all_ended, "all of them are cut off", within_s=40.0)
    print({name: f"{seconds:.0f} s" for name, seconds in ended.items()})
    for sock, _ in slow.values():
        sock.close()


def is_closed(sock: socket.socket) -> bool:
    """True if the other side has closed or reset it."""
    sock.settimeout(0.001)
    try:
        return sock.recv(4096) == b""
    except (TimeoutError, BlockingIOError):
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(5.0)


def test_nothing_of_ours_is_left_in_the_folder(target: Target) -> None:
    """Control: after these attacks, no temporary file is left."""
    names = {path.name for path in files_in(target.site.home)}
    assert not [name for name in names if name.endswith(".tmp")]
    assert Path(target.site.home / "spool").is_dir()
