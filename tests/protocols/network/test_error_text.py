"""Failed connections in words, from real ones."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from protocols.enrollment import certificates, identity
from protocols.network.error_text import describe_error


@contextmanager
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def told(url: str, timeout_s: float = 5.0) -> str:
    with pytest.raises(httpx.HTTPError) as raised:
        httpx.get(url, timeout=timeout_s, trust_env=False)
    return describe_error(raised.value)


def test_nobody_listens() -> None:
    with listener() as server:
        port = server.getsockname()[1]
    assert told(f"http://127.0.0.1:{port}/") == "nothing listens on that port"


def test_nobody_answers() -> None:
    with listener() as server:
        port = server.getsockname()[1]
        assert told(f"http://127.0.0.1:{port}/", 0.1) == "no answer in time"


def test_it_breaks_off() -> None:
    with listener() as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            accepted, _ = server.accept()
            accepted.recv(1024)
            accepted.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert told(f"http://127.0.0.1:{port}/").startswith("the connection was closed")
        thread.join()


def test_no_such_machine_and_others() -> None:
    assert describe_error(socket.gaierror(-2, "Name or service not known")).startswith(
        "there is no machine"
    )
    assert describe_error(OSError(113, "No route to host")) == "no route to host"
    assert describe_error(ValueError()) == "ValueError"
    round_about = ValueError("a")
    round_about.__cause__ = KeyError("b")
    round_about.__cause__.__cause__ = round_about
    assert describe_error(round_about) == "a"


@pytest.mark.parametrize("name", ["192.0.2.2", "other.lan", "fd00::1"])
def test_a_certificate_for_other_names_says_which_name_it_lacks(name: str, tmp_path: Path) -> None:
    ca_key, ca_pem = certificates.new_ca("here")
    key, pem = certificates.new_server_certificate(ca_key, ca_pem, ["localhost", "192.0.2.1"])
    (tmp_path / "server.pem").write_bytes(pem)
    (tmp_path / "server.key").write_bytes(identity.private_pem(key))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    client = ssl.create_default_context(cadata=ca_pem.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(down, up, server_hostname=name)
    there = server.wrap_bio(up, down, server_side=True)
    with pytest.raises(ssl.SSLCertVerificationError) as caught:  # noqa: PT012
        for _ in range(4):
            for end in (here, there):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    text = describe_error(caught.value)
    fix = f"on the coordinator: commonweight init --san {name}"
    assert text == f"its certificate does not name {name} ({fix})"
