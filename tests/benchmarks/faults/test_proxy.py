"""The fault proxy does what it says, or the cases behind it prove nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import BLACKHOLE, CLEAR, HOST, Fault, Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says everything back."""
    server = socket.create_server((HOST, 0))

    def say_back(sock: socket.socket) -> None:
        with sock:
            try:
                while piece := sock.recv(65536):
                    sock.sendall(piece)
            except OSError:
                pass

    def serve() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=say_back, args=(sock,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def connected(proxy: Proxy) -> socket.socket:
    sock = socket.create_connection((HOST, proxy.port), timeout=10)
    sock.settimeout(10)
    return sock


def answer(sock: socket.socket, nbytes: int) -> bytes:
    found = b""
    while len(found) < nbytes and (piece := sock.recv(65536)):
        found += piece
    return found


def test_without_a_fault_all_bytes_pass(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as sock:
        data = bytes(range(256)) * 4000
        threading.Thread(target=sock.sendall, args=(data,), daemon=True).start()
        assert answer(sock, len(data)) == data
        assert proxy.connections == 1
        assert proxy.bytes_up == len(data)


def test_a_blackhole_keeps_the_connection_and_the_bytes_until_it_heals(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as sock:
        proxy.fault = BLACKHOLE
        sock.sendall(b"hello")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(5)
        proxy.fault = CLEAR
        sock.settimeout(10)
        assert answer(sock, 5) == b"hello"


def test_one_way_lets_the_other_pass(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as sock:
        proxy.fault = Fault(hold_down=True)
        sock.sendall(b"hello")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(5)
        assert proxy.bytes_up == 5


def test_a_reset_is_one(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as sock:
        sock.sendall(b"hello")
        assert answer(sock, 5) == b"hello"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            sock.recv(5)


@pytest.mark.parametrize("cut", [1, 1000, 70_000])
def test_what_is_truncated_ends_at_that_byte(echo: int, cut: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as sock:
        proxy.fault = Fault(cut_after=cut)
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            sock.sendall(bytes(1 << 26))
        assert proxy.bytes_up <= cut


def test_who_is_refused_gets_nothing(echo: int) -> None:
    with Proxy(echo) as proxy:
        proxy.fault = Fault(refuse=True)
        # The reset may come before the connection is told to be there.
        with pytest.raises(ConnectionResetError), connected(proxy) as sock:
            sock.recv(5)


def test_a_line_that_is_cut_loses_what_was_on_it(echo: int) -> None:
    with Proxy(echo) as proxy:
        proxy.fault = Fault(line_bytes_per_s=1e6, drop_up_per_mb=1e6)
        with connected(proxy) as sock:
            sock.sendall(b"x" * 1000)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert (proxy.drops, proxy.bytes_up, proxy.bytes_down) == (1, 1000, 0)
