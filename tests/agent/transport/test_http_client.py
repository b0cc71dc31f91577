"""Which way out the agent's link takes, and that it can be ended at any time."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.transport import connection, http_client
from agent.transport.connection import Proxy, proxy_for
from agent.transport.http_client import HttpClient
from protocols.enrollment import certificates, identity
from protocols.errors import Unreachable
from tests.support.waiting import wait_for

PATIENCE_S = 60.0


@pytest.mark.parametrize(
    ("url", "no_proxy", "proxy"),
    [
        ("", "", None),
        ("http://gate:8080", "", Proxy("gate", 8080, {})),
        ("gate:8080", "", Proxy("gate", 8080, {})),
        ("http://gate", "", Proxy("gate", 3128, {})),
        ("http://gate:8080", "train.example.org", None),
        ("http://gate:8080", "other.example.org", Proxy("gate", 8080, {})),
        (
            "http://ann:a%40b@gate:8080",
            "",
            Proxy("gate", 8080, {"proxy-authorization": "Basic YW5uOmFAYg=="}),
        ),
    ],
)
def test_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, proxy: Proxy | None
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if url:
        monkeypatch.setenv("HTTPS_PROXY", url)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_for("train.example.org", 9092) == proxy


# --- ending ----------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A socket that listens, with nobody behind it who answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        yield listener


class Asking:
    """A request to `silent` in a thread."""

    def __init__(self, *silent: socket.socket) -> None:
        places = ["{}:{}".format(*one.getsockname()) for one in silent]
        tls = ssl.create_default_context()
        self.wire = HttpClient(places, tls, timeout_s=600.0, max_idle_s=60.0)
        self.failure: Unreachable | None = None
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        try:
            self.wire.request("GET", "/", {})
        except Unreachable as err:
            self.failure = err


def connecting(port: int) -> int:
    """How many connections of this process to this port are not there yet."""
    found = psutil.Process().net_connections("tcp4")
    return sum(one.status == psutil.CONN_SYN_SENT and one.raddr.port == port for one in found)


def test_a_request_that_waits_for_the_handshake_ends_when_the_link_closes(
    silent: socket.socket,
) -> None:
    asking = Asking(silent)
    accepted, _ = silent.accept()
    with accepted:
        assert accepted.recv(1), "the handshake has begun"
        asking.wire.close()
        asking.thread.join(PATIENCE_S)
        assert asking.failure is not None


def test_the_next_address_is_tried_when_one_accepts_and_never_answers(
    silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECTED_WITHIN_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(PATIENCE_S)
        asking = Asking(silent, other)
        accepted, _ = other.accept()
        with accepted:
            assert accepted.recv(1), "the handshake has begun"
            asking.wire.close()
            asking.thread.join(PATIENCE_S)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_server_that_hangs_is_told_from_one_that_takes_long(
    silent: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(http_client, "QUIET_S", 0.1)
    # A busy machine needs a while for a handshake.
    monkeypatch.setattr(http_client, "CONNECTED_WITHIN_S", 0.5 if hangs else PATIENCE_S)
    key, ca_pem = certificates.new_ca("test")
    server_key, pem = certificates.new_server_certificate(key, ca_pem, ["127.0.0.1"])
    (tmp_path / "pem").write_bytes(pem + identity.private_pem(server_key))
    tls = ssl.create_default_context(cadata=ca_pem.decode())
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(tmp_path / "pem")
    answers: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = ["{}:{}".format(*one.getsockname()) for one in (server, silent)]
        client = HttpClient(places, tls, timeout_s=600.0, max_idle_s=60.0)

        def ask() -> None:
            with contextlib.suppress(Unreachable):
                answers.append(client.request("GET", "/", {}).body)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        server.settimeout(PATIENCE_S)
        with server_tls.wrap_socket(server.accept()[0], server_side=True) as first:
            assert first.recv(1000).startswith(b"GET / ")
            if not hangs:  # the probe arrives
                server_tls.wrap_socket(server.accept()[0], server_side=True).close()
                first.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate")
            asking.join(PATIENCE_S)
        client.close()
    assert not asking.is_alive()
    assert answers == ([] if hangs else [b"late"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full queue refuses at once")
def test_a_request_that_waits_for_a_connection_ends_when_the_link_closes(
    silent: socket.socket,
) -> None:
    port = silent.getsockname()[1]
    with contextlib.ExitStack() as stack:
        while not (before := connecting(port)):  # until the queue of the listener is full
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        asking = Asking(silent)
        wait_for(lambda: connecting(port) > before, "it connects")
        asking.wire.close()
        asking.thread.join(PATIENCE_S)
        assert asking.failure is not None


def test_a_closed_link_makes_no_connection(silent: socket.socket) -> None:
    host, port = silent.getsockname()
    wire = HttpClient(
        [f"{host}:{port}"], ssl.create_default_context(), timeout_s=600.0, max_idle_s=60.0
    )
    wire.close()
    with pytest.raises(Unreachable, match="closed"):
        wire.request("GET", "/", {})
    silent.setblocking(False)
    with pytest.raises(BlockingIOError):
        silent.accept()
