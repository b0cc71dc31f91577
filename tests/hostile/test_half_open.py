"""300 half-open connections: honest agents are served, stalled connections are closed."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from pathlib import Path

import psutil
import pytest

from agent.home import enrollment_file
from agent.home.credentials import Credentials
from agent.transport.coordinator_client import CoordinatorClient
from coordinator.transport.connection_limits import (
    MAX_NEW_BURST,
    MAX_PER_CLIENT,
    RateLimitedListener,
    client_key,
)
from coordinator.transport.http_connection import READ_TIMEOUT_S
from coordinator.transport.http_server import HANDSHAKE_TIMEOUT_S, listen
from tests.hostile.tools import bounded_growth, plain, secure
from tests.support.fleet_harness import fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.attack("20.wire", by="stranger")

EXCHANGES = 200
#: Added to the server's limits for its check interval and a busy machine.
SLACK_S = 20.0


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def is_open(sock: socket.socket) -> bool:
    """True unless the other side has closed or reset it."""
    sock.setblocking(False)
    try:
        return sock.recv(65536) != b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False


@pytest.mark.long
def test_an_honest_agent_is_served_beside_300_half_open_connections(tmp_path: Path) -> None:
    """Attack: hold 300 half-open connections, so that an honest agent is not served."""
    with fleet(tmp_path) as site:
        site.up()
        site.join("ada")
        up = json.loads((site.home / "up.json").read_bytes())
        port = int(up["address"].rpartition(":")[2])
        enrollment = enrollment_file.read_enrollment(tmp_path / "ada")
        server = psutil.Process(up["pid"])
        honest = CoordinatorClient(Credentials.load(tmp_path / "ada", enrollment))
        honest.open()
        with bounded_growth(up["pid"], 64, "300 half-open connections"):
            silent = [plain(port) for _ in range(150)]
            stalled = [plain(port) for _ in range(75)]
            for number, sock in enumerate(stalled):  # the first bytes of a TLS hello, then nothing
                sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(number))
            partial = [secure(port, enrollment.ca_pem) for _ in range(75)]
            for number, secured in enumerate(partial):
                secured.sendall(b"POST /cw/v1/exchange HTTP/1.1\r\nx: " + b"y" * number)
            began = time.monotonic()
            seconds = []
            for _ in range(EXCHANGES):
                start = time.monotonic()
                assert honest.pull() is None
                seconds.append(time.monotonic() - start)
            held = [*silent, *stalled, *partial]
            still = sum(is_open(sock) for sock in held)
            print(
                f"{EXCHANGES} signed exchanges beside {still} half-open connections:"
                f" p50 {percentile(seconds, 0.5) * 1e3:.1f} ms,"
                f" p99 {percentile(seconds, 0.99) * 1e3:.1f} ms, most {max(seconds) * 1e3:.1f} ms"
            )
            assert still == len(held) == 300
        limit_s = max(HANDSHAKE_TIMEOUT_S, READ_TIMEOUT_S) + SLACK_S
        wait_for(
            lambda: not any(is_open(sock) for sock in held), "all that stall are dropped", limit_s
        )
        print(f"all dropped after {time.monotonic() - began:.0f} s")
        wait_for(lambda: len(server.net_connections("tcp")) < 50, "their sockets are closed")
        for sock in held:
            sock.close()
        assert honest.pull() is None
        honest.close()


def test_one_address_can_hold_so_many_connections_and_no_more(tmp_path: Path) -> None:
    """Attack: one address opens connections without end, and leaves them in the TLS handshake.

    uvicorn does not see these.
    """
    listener = listen("127.0.0.1", 0)
    assert isinstance(listener, RateLimitedListener)
    listener.listen(64)
    port = listener.getsockname()[1]
    listener.open_connections["127.0.0.1"] = MAX_PER_CLIENT - 3
    theirs = [plain(port) for _ in range(6)]
    ours: list[socket.socket] = []
    while _accepted(listener, ours):
        pass
    assert len(ours) == 3
    assert sum(is_open(sock) for sock in theirs) == 3
    ours.pop().close()
    late = plain(port)
    wait_for(lambda: _accepted(listener, ours), "there is room again")
    assert is_open(late)
    for sock in [*ours, *theirs, late]:
        sock.close()
    assert listener.open_connections["127.0.0.1"] == MAX_PER_CLIENT - 3
    listener.close()


def _accepted(listener: socket.socket, into: list[socket.socket]) -> bool:
    try:
        into.append(listener.accept()[0])
    except BlockingIOError:
        return False
    return True


def test_new_connections_come_at_a_bounded_rate(tmp_path: Path) -> None:
    """Attack: open new connections as fast as possible."""
    listener = listen("127.0.0.1", 0)
    assert isinstance(listener, RateLimitedListener)
    assert sum(listener._admit("10.0.0.1") for _ in range(MAX_NEW_BURST * 2)) < MAX_NEW_BURST * 1.2
    assert listener._admit("10.0.0.2")
    assert client_key("2001:db8::1") == client_key("2001:db8::ffff:1") != client_key("2001:db9::1")
    assert client_key("::ffff:10.0.0.1") == client_key("10.0.0.1")
    assert client_key("fe80::1%eth0") == client_key("fe80::2")
    listener.drop_full_buckets(time.monotonic() + 1e6)
    assert not listener._buckets
    listener.close()
    assert os.name == "nt" or listener.fileno() == -1
