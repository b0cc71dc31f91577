"""Large bodies in a thread's hands: whole, cut, wrong and slow, and what follows on the wire."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.transport import tls_offload
from coordinator.transport.weights import OFFSET
from tests.support.https_site import Machine, Site, until

SIZE = 3 * 1024 * 1024 + 7
BODY = os.urandom(SIZE)
DIGEST = hashlib.sha256(BODY).hexdigest()
PATH = f"/cw/v1/updates/{DIGEST}"
HEADERS = {"content-length": str(SIZE), OFFSET: "0"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site")).up() as running:
        running.lane.limit_bytes = 2 * SIZE
        yield running


@pytest.fixture
def machine(served: Site) -> Machine:
    served.lane.drop_updates()
    return served.enrol()


@pytest.fixture
def wire(served: Site) -> Iterator[http.client.HTTPSConnection]:
    tls = ssl.create_default_context(cadata=served.ca_pem.decode())
    connection = http.client.HTTPSConnection(served.address, timeout=20, context=tls)
    yield connection
    connection.close()


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each lending."""
    found: list[int] = []
    lend = tls_offload.lend

    async def counted(transport: object, work: object) -> int:
        found.append(0)
        found[-1] = await lend(transport, work)  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(tls_offload, "lend", counted)
    return found


def status(wire: http.client.HTTPSConnection) -> int:
    answer = wire.getresponse()
    answer.read()
    return answer.status


def spooled(served: Site) -> list[Path]:
    return list((served.folder / "spool").iterdir())


def test_bodies_of_all_lengths_go_through_a_thread_and_the_connection_goes_on(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, moved: list[int]
) -> None:
    signed = machine.headers("PUT", PATH, digest=DIGEST)
    wire.request("PUT", PATH, BODY, {**signed, **HEADERS})
    assert status(wire) == 200
    assert any(moved), "some of it was moved by a thread"
    (file,) = spooled(served)
    assert file.read_bytes() == BODY
    (served.folder / "versions" / f"{DIGEST}.safetensors").write_bytes(BODY)
    moved.clear()
    path = f"/cw/v1/weights/{DIGEST}"
    for _ in range(2):  # on the same connection
        wire.request("GET", path, headers=machine.headers("GET", path))
        answer = wire.getresponse()
        assert (answer.status, answer.read()) == (200, BODY)
    assert any(moved)
    assert served.lane.bytes_up == SIZE
    assert served.lane.bytes_down == 2 * SIZE


def test_another_body_than_announced_is_refused_and_leaves_nothing(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, moved: list[int]
) -> None:
    signed = machine.headers("PUT", PATH, digest=DIGEST)
    wire.request("PUT", PATH, BODY[:-1] + b"x", {**signed, **HEADERS})
    assert status(wire) == 422
    assert moved
    assert spooled(served) == []
    wire.request("PUT", PATH, BODY, {**machine.headers("PUT", PATH, digest=DIGEST), **HEADERS})
    assert status(wire) == 200


def test_what_came_before_a_cut_is_resumed(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, moved: list[int]
) -> None:
    half = SIZE // 2
    wire.putrequest("PUT", PATH)
    for name, value in {**machine.headers("PUT", PATH, digest=DIGEST), **HEADERS}.items():
        wire.putheader(name, value)
    wire.endheaders(BODY[:half])
    until(lambda: [file.stat().st_size for file in spooled(served)] == [half])
    wire.close()
    headers = {"content-length": str(SIZE - half), OFFSET: str(half)}

    def resumed() -> bool:
        signed = machine.headers("PUT", PATH, digest=DIGEST)
        wire.request("PUT", PATH, BODY[half:], {**signed, **headers})
        return status(wire) == 200

    until(resumed)
    assert spooled(served)[0].read_bytes() == BODY
    assert moved


def test_a_slow_sender_is_left_to_the_loop(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, moved: list[int]
) -> None:
    wire.putrequest("PUT", PATH)
    for name, value in {**machine.headers("PUT", PATH, digest=DIGEST), **HEADERS}.items():
        wire.putheader(name, value)
    wire.endheaders()
    step = SIZE // 12
    for start in range(0, SIZE, step):
        wire.send(BODY[start : start + step])
        time.sleep(0.06)  # slow is what it is to be: longer than a thread waits
    assert status(wire) == 200
    assert spooled(served)[0].read_bytes() == BODY
    assert tls_offload._busy == 0


def test_a_reader_that_stops_has_the_rest_from_the_loop(
    served: Site, machine: Machine, wire: http.client.HTTPSConnection, moved: list[int]
) -> None:
    body = BODY * 8
    digest = hashlib.sha256(body).hexdigest()
    (served.folder / "versions" / f"{digest}.safetensors").write_bytes(body)
    path = f"/cw/v1/weights/{digest}"
    wire.request("GET", path, headers=machine.headers("GET", path))
    until(lambda: bool(moved) and moved[-1] > 0)
    assert tls_offload._busy == 0
    assert wire.getresponse().read() == body
