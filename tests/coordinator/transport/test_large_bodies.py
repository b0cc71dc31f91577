"""Large bodies over TLS: whole, cut off, wrong and slow, and requests that follow them."""

from __future__ import annotations

import hashlib
import http.client
import os
import select
import socket
import ssl
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.transport import streams, tls_offload
from coordinator.transport.weights import OFFSET
from tests.support.https_site import Machine, Site
from tests.support.waiting import wait_for

SIZE = 3 * 1024 * 1024 + 7
BODY = os.urandom(SIZE)
DIGEST = hashlib.sha256(BODY).hexdigest()
PATH = f"/cw/v1/updates/{DIGEST}"
HEADERS = {"content-length": str(SIZE), OFFSET: "0"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site")).up() as running:
        running.transfer.limits.max_bytes = 2 * SIZE
        yield running


@pytest.fixture
def machine(served: Site) -> Machine:
    served.lane.uploads.clear()
    return served.enroll()


@pytest.fixture
def wire(served: Site) -> Iterator[http.client.HTTPSConnection]:
    tls = ssl.create_default_context(cadata=served.ca_pem.decode())
    connection = http.client.HTTPSConnection(served.address, timeout=20, context=tls)
    yield connection
    connection.close()


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each thread has received; 0 while it is at work."""
    received: list[int] = []
    offload = tls_offload.offload

    async def counted(transport: object, work: object) -> int:
        received.append(0)
        received[-1] = await offload(transport, work)  # type: ignore[arg-type]
        return received[-1]

    monkeypatch.setattr(tls_offload, "offload", counted)
    return received


def status(wire: http.client.HTTPSConnection) -> int:
    answer = wire.getresponse()
    answer.read()
    return answer.status


def spooled(served: Site) -> list[Path]:
    return list((served.folder / "spool").iterdir())


def test_large_bodies_arrive_whole_and_the_connection_is_reused(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, offloaded: list[int]
) -> None:
    signed = machine.headers("PUT", PATH, digest=DIGEST)
    wire.request("PUT", PATH, BODY, {**signed, **HEADERS})
    assert status(wire) == 200
    assert any(offloaded), "a thread received some of it"
    (file,) = spooled(served)
    assert file.read_bytes() == BODY
    (served.folder / "versions" / f"{DIGEST}.safetensors").write_bytes(BODY)
    path = f"/cw/v1/weights/{DIGEST}"
    for _ in range(2):  # on the same connection
        wire.request("GET", path, headers=machine.headers("GET", path))
        answer = wire.getresponse()
        assert (answer.status, answer.read()) == (200, BODY)
    assert served.transfer.bytes_up == SIZE
    assert served.transfer.bytes_down == 2 * SIZE


def test_a_body_with_another_digest_is_refused_and_deleted(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, offloaded: list[int]
) -> None:
    signed = machine.headers("PUT", PATH, digest=DIGEST)
    wire.request("PUT", PATH, BODY[:-1] + b"x", {**signed, **HEADERS})
    assert status(wire) == 422
    assert any(offloaded), "a thread received some of it"
    assert spooled(served) == []
    wire.request("PUT", PATH, BODY, {**machine.headers("PUT", PATH, digest=DIGEST), **HEADERS})
    assert status(wire) == 200


def test_an_upload_resumes_where_it_was_cut_off(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, offloaded: list[int]
) -> None:
    half = SIZE // 2
    wire.putrequest("PUT", PATH)
    for name, value in {**machine.headers("PUT", PATH, digest=DIGEST), **HEADERS}.items():
        wire.putheader(name, value)
    wire.endheaders(BODY[:half])
    wait_for(lambda: [file.stat().st_size for file in spooled(served)] == [half])
    wire.close()
    headers = {"content-length": str(SIZE - half), OFFSET: str(half)}

    def resumed() -> bool:
        signed = machine.headers("PUT", PATH, digest=DIGEST)
        wire.request("PUT", PATH, BODY[half:], {**signed, **headers})
        return status(wire) == 200

    wait_for(resumed)
    assert spooled(served)[0].read_bytes() == BODY


def test_a_slow_sender_can_finish(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, offloaded: list[int]
) -> None:
    wire.putrequest("PUT", PATH)
    for name, value in {**machine.headers("PUT", PATH, digest=DIGEST), **HEADERS}.items():
        wire.putheader(name, value)
    wire.endheaders()
    step = SIZE // 12
    for start in range(0, SIZE, step):
        wire.send(BODY[start : start + step])
        time.sleep(0.06)  # the sender must be slow; nothing here waits for this time
    assert status(wire) == 200
    assert spooled(served)[0].read_bytes() == BODY


def test_a_reader_that_pauses_receives_the_rest(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection
) -> None:
    body = BODY * 8
    digest = hashlib.sha256(body).hexdigest()
    (served.folder / "versions" / f"{digest}.safetensors").write_bytes(body)
    path = f"/cw/v1/weights/{digest}"
    wire.request("GET", path, headers=machine.headers("GET", path))
    wait_for(lambda: served.transfer.bytes_down >= len(body))  # counted when the response starts
    wait_for(lambda: select.select([wire.sock], [], [], 0)[0])
    assert wire.getresponse().read() == body


def test_many_downloads_at_once_take_little_memory(
    served: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of clients that do not read. Otherwise asyncio buffers 512 KB and a piece for each."""
    monkeypatch.setattr(streams, "_FEW_FILES", 4)
    version = os.urandom(16 * 1024 * 1024)
    digest = hashlib.sha256(version).hexdigest()
    served.lane.version_path(digest).write_bytes(version)
    path, machine = f"/cw/v1/weights/{digest}", served.enroll()
    tls = ssl.create_default_context(cadata=served.ca_pem.decode())
    host, port = served.address.split(":")
    clients = []
    tracemalloc.start()
    try:
        for _ in range(48):
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            plain.connect((host, int(port)))
            client = tls.wrap_socket(plain, server_hostname=host)
            clients.append(client)
            head = [f"GET {path} HTTP/1.1", f"host: {host}"]
            head += [f"{name}: {value}" for name, value in machine.headers("GET", path).items()]
            client.sendall("\r\n".join((*head, "", "")).encode())
        sending = streams.WholeFileResponse
        wait_for(lambda: sending._num_sending == len(clients), "all are being sent")
        before = -1
        while before != (before := tracemalloc.get_traced_memory()[0] >> 20):  # it has come to rest
            time.sleep(1)
        assert tracemalloc.get_traced_memory()[1] < 48 * 300 * 1024
    finally:
        tracemalloc.stop()
        for client in clients:
            client.close()
    wait_for(lambda: sending._num_sending == 0, "the connections are closed")
