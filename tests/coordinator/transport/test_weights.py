"""The weight lane over real TLS: whole, in part, resumed, and never anything wrong under a name."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.weight_transfer import CoordinatorDiskFull, SessionLost
from benchmarks.faults.disk import can_mount, fill, small_disk
from coordinator.transport.weights import OFFSET
from protocols.errors import BadWeights, CommonweightError, Refused, Unreachable
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.https_site import HOST, Machine, Site
from tests.support.waiting import wait_for

MODEL = Weights({"w": np.arange(70_000, dtype=np.float32)})
DATA = weights.to_bytes(MODEL)
DIGEST = weights.digest(MODEL)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site")).up() as running:
        yield running


@pytest.fixture
def site(served: Site) -> Site:
    """The server, with a lane that is empty."""
    served.lane.uploads.clear()
    for version in (served.folder / "versions").iterdir():
        version.unlink()
    served.transfer.bytes_up = served.transfer.bytes_down = 0
    served.transfer.limits.max_bytes = 1 << 20
    return served


def spool(site: Site) -> list[str]:
    return sorted(path.name for path in (site.folder / "spool").iterdir())


def put(
    http: httpx.Client,
    machine: Machine,
    data: bytes,
    digest: str = DIGEST,
    offset: int = 0,
    **headers: str,
) -> httpx.Response:
    path = f"/cw/v1/updates/{digest}"
    signed = machine.headers("PUT", path, digest=digest) | {OFFSET: str(offset)} | headers
    return http.put(path, content=data, headers=signed)


def get(http: httpx.Client, machine: Machine, digest: str, **headers: str) -> httpx.Response:
    path = f"/cw/v1/weights/{digest}"
    return http.get(path, headers=machine.headers("GET", path) | headers)


# --- versions --------------------------------------------------------------------------------


def test_a_version_is_downloaded_whole(
    site: Site, http: httpx.Client, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    assert site.lane.save(MODEL) == DIGEST
    assert get(http, machine, DIGEST).content == DATA
    target = tmp_path / "version.safetensors"
    link.download(DIGEST, len(DATA), target)
    assert target.read_bytes() == DATA
    assert site.transfer.bytes_down == 2 * len(DATA)
    assert link.bytes_down == len(DATA)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("bytes=0-99", DATA[:100]), ("bytes=1000-", DATA[1000:]), ("bytes=-10", DATA[-10:])],
)
def test_a_range(
    site: Site, http: httpx.Client, machine: Machine, wanted: str, expected: bytes
) -> None:
    site.lane.save(MODEL)
    answer = get(http, machine, DIGEST, range=wanted)
    assert answer.status_code == 206
    assert answer.content == expected


def test_a_range_beyond_the_end_is_refused(
    site: Site, http: httpx.Client, machine: Machine
) -> None:
    site.lane.save(MODEL)
    answer = get(http, machine, DIGEST, range=f"bytes={len(DATA)}-")
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"
    assert DATA[:100] not in answer.content


@pytest.mark.parametrize("have", [1, 5000, len(DATA) - 1, len(DATA)])
def test_a_download_goes_on_where_it_was_cut(
    site: Site, link: CoordinatorClient, tmp_path: Path, have: int
) -> None:
    """Also when the crash came after the last byte and before the rename."""
    site.lane.save(MODEL)
    target = tmp_path / "version.safetensors"
    target.with_suffix(".part").write_bytes(DATA[:have])
    link.download(DIGEST, len(DATA), target)
    assert target.read_bytes() == DATA
    assert link.bytes_down == len(DATA) - have
    assert not target.with_suffix(".part").exists()


@pytest.mark.parametrize("part", [b"x" * 5000, b"x" * len(DATA), b"x" * (len(DATA) + 1)])
def test_rubbish_in_a_part_file_is_found_and_does_no_lasting_harm(
    site: Site, link: CoordinatorClient, tmp_path: Path, part: bytes
) -> None:
    site.lane.save(MODEL)
    target = tmp_path / "version.safetensors"
    target.with_suffix(".part").write_bytes(part)
    try:
        link.download(DIGEST, len(DATA), target)
    except BadWeights:
        assert not target.exists()
        link.download(DIGEST, len(DATA), target)
    assert target.read_bytes() == DATA


def test_a_version_that_is_not_its_digest_never_gets_its_name(
    site: Site, link: CoordinatorClient, tmp_path: Path
) -> None:
    site.lane.version_path(DIGEST).write_bytes(DATA[:-1] + b"\0")
    target = tmp_path / "version.safetensors"
    for nbytes in (len(DATA), len(DATA) - 10):
        with pytest.raises(BadWeights):
            link.download(DIGEST, nbytes, target)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(Unreachable, match="incomplete"):
        link.download(DIGEST, len(DATA) + 10, target)
    assert not target.exists()


def test_an_unknown_version_means_a_lost_session(link: CoordinatorClient, tmp_path: Path) -> None:
    with pytest.raises(SessionLost):
        link.download("0" * 64, 10, tmp_path / "version.safetensors")


# --- updates ---------------------------------------------------------------------------------


def test_an_update_is_uploaded_once(
    site: Site, link: CoordinatorClient, machine: Machine, tmp_path: Path
) -> None:
    source = tmp_path / "update.safetensors"
    assert weights.save(MODEL, source) == DIGEST
    link.upload(DIGEST, source)
    assert weights.file_digest(site.lane.uploads.path(machine.peer, DIGEST)) == DIGEST
    received = site.transfer.bytes_up
    link.upload(DIGEST, source)  # asked again after a lost link
    assert site.transfer.bytes_up == received == len(DATA)
    assert spool(site) == [f"{machine.peer}-{DIGEST}.safetensors"]
    site.lane.uploads.clear()
    assert spool(site) == []
    with pytest.raises(BadWeights, match="never uploaded"):
        site.lane.uploads.open(machine.peer, DIGEST)


def test_other_bytes_than_announced_are_dropped(
    site: Site, http: httpx.Client, machine: Machine
) -> None:
    assert put(http, machine, DATA[:-1] + b"\0").status_code == 422
    assert spool(site) == []
    assert put(http, machine, DATA).status_code == 200


def test_more_than_the_model_is_not_taken(site: Site, http: httpx.Client, machine: Machine) -> None:
    site.transfer.limits.max_bytes = len(DATA) - 1
    assert put(http, machine, DATA).status_code == 413
    assert put(http, machine, DATA[10:], offset=10).status_code == 413
    assert put(http, machine, b"", offset=10**15 - 1).status_code == 413
    assert spool(site) == []


def test_an_upload_that_cannot_be_taken_is_a_refusal_and_not_a_lost_link(
    site: Site, link: CoordinatorClient, tmp_path: Path
) -> None:
    """An agent that took it for a lost link would try again for ever."""
    source = tmp_path / "update.safetensors"
    weights.save(MODEL, source)
    site.transfer.limits.max_bytes = 10
    for digest in (DIGEST, "0" * 64):
        with pytest.raises(Refused) as caught:
            link.upload(digest, source)
        assert not isinstance(caught.value, SessionLost)
        site.transfer.limits.max_bytes = 1 << 20


@pytest.mark.parametrize("headers", [{OFFSET: "-1"}, {OFFSET: "x"}, {OFFSET: "1" * 16}])
def test_an_offset_is_a_number(
    http: httpx.Client, machine: Machine, headers: dict[str, str]
) -> None:
    assert put(http, machine, DATA, **headers).status_code == 411


def test_an_upload_says_its_length(http: httpx.Client, machine: Machine) -> None:
    path = f"/cw/v1/updates/{DIGEST}"
    answer = http.put(
        path, content=iter([DATA]), headers=machine.headers("PUT", path, digest=DIGEST)
    )
    assert answer.status_code == 411


def raw_put(site: Site, machine: Machine, announced: int, sent: bytes) -> ssl.SSLSocket:
    """An upload by hand, left open after these bytes."""
    path = f"/cw/v1/updates/{DIGEST}"
    head = machine.headers("PUT", path, digest=DIGEST) | {"content-length": str(announced)}
    lines = [f"PUT {path} HTTP/1.1", f"host: {site.address}"]
    lines += [f"{name}: {value}" for name, value in head.items()]
    context = ssl.create_default_context(cadata=site.ca_pem.decode())
    plain = socket.create_connection((HOST, int(site.address.rpartition(":")[2])))
    secure = context.wrap_socket(plain, server_hostname=HOST)
    secure.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
    return secure


def part_size(site: Site, machine: Machine) -> int:
    part = site.folder / "spool" / f"{machine.peer}-{DIGEST}.part"
    return part.stat().st_size if part.exists() else 0


def test_a_short_body_leaves_a_part_that_can_be_resumed(
    site: Site, http: httpx.Client, machine: Machine
) -> None:
    secure = raw_put(site, machine, len(DATA), DATA[:20_000])
    wait_for(lambda: part_size(site, machine) > 0)
    secure.close()
    with pytest.raises(BadWeights):
        site.lane.uploads.open(machine.peer, DIGEST)
    have = 0

    def settled() -> bool:  # the server has noticed: what it says it has, it takes
        nonlocal have
        answer = put(http, machine, b"", offset=len(DATA))
        have = answer.json()["have"]
        return answer.status_code == 409 and have == part_size(site, machine)

    wait_for(settled)
    assert 0 < have <= 20_000
    assert put(http, machine, DATA[have:], offset=have).status_code == 200
    assert weights.file_digest(site.lane.uploads.path(machine.peer, DIGEST)) == DIGEST
    assert len(spool(site)) == 1


def test_a_longer_body_than_announced_is_cut_off_or_refused(site: Site, machine: Machine) -> None:
    secure = raw_put(site, machine, len(DATA) - 1, DATA)
    answer = secure.recv(100)
    secure.close()
    assert b"422" in answer
    assert spool(site) == []


def test_a_second_upload_takes_the_place_of_a_stuck_one(
    site: Site, http: httpx.Client, machine: Machine
) -> None:
    """What the stuck one still sends must not reach the file that has the name by then."""
    stuck = raw_put(site, machine, len(DATA), b"x" * 20_000)
    wait_for(lambda: part_size(site, machine) == 20_000)
    assert put(http, machine, DATA).status_code == 200
    done = site.folder / "spool" / f"{machine.peer}-{DIGEST}.safetensors"
    assert done.read_bytes() == DATA
    stuck.sendall(b"x" * 20_000)
    assert b"HTTP/1.1 4" in stuck.recv(100)
    stuck.close()
    assert done.read_bytes() == DATA
    assert spool(site) == [done.name]


def test_two_uploads_at_once_end_with_the_right_bytes(
    site: Site, http: httpx.Client, machine: Machine
) -> None:
    statuses: list[int] = []

    def upload() -> None:
        with site.http() as mine:
            statuses.append(put(mine, machine, DATA).status_code)

    threads = [threading.Thread(target=upload) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 200 in statuses
    assert set(statuses) <= {200, 409}
    assert weights.file_digest(site.lane.uploads.path(machine.peer, DIGEST)) == DIGEST


# --- who may -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/cw/v1/weights/" + "0" * 63,
        "/cw/v1/weights/" + "A" * 64,
        "/cw/v1/weights/../ledger.db",
        "/cw/v1/weights/..%2Fledger.db",
        "/cw/v1/weights/%2e%2e%2f" + "0" * 58,
        "/cw/v1/weights/" + "0" * 64 + "%0a",
        "/cw/v1/weights/",
        "/cw/v1/weights/" + "0" * 64 + "/x",
    ],
)
def test_only_a_digest_is_looked_up(
    http: httpx.Client, machine: Machine, site: Site, path: str
) -> None:
    decoded = httpx.URL(path).path
    answer = http.get(path, headers=machine.headers("GET", decoded))
    assert answer.status_code in (401, 404)


@pytest.mark.parametrize("digest", ["../../ledger", "..%2F..%2Fx", "0" * 64 + "%00"])
def test_an_upload_cannot_choose_its_place(
    http: httpx.Client, machine: Machine, site: Site, digest: str
) -> None:
    path = f"/cw/v1/updates/{digest}"
    answer = http.put(
        path, content=b"x", headers=machine.headers("PUT", httpx.URL(path).path, b"x")
    )
    assert answer.status_code in (404, 401)
    assert spool(site) == []


@pytest.mark.parametrize("digest", ["", "..", "../versions/" + "0" * 50, "/etc/passwd", "x" * 64])
def test_a_claimed_digest_cannot_open_another_file(site: Site, digest: str) -> None:
    """A claim's digest is text that a peer chose."""
    with pytest.raises(BadWeights):
        site.lane.uploads.open("P", digest)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_nobody_gets_by_unsigned_or_with_anothers_signature(
    site: Site, http: httpx.Client, machine: Machine, method: str
) -> None:
    site.lane.save(MODEL)
    part = "weights" if method == "GET" else "updates"
    path = f"/cw/v1/{part}/{DIGEST}"
    body: dict[str, Any] = {"content": DATA} if method == "PUT" else {}
    digest = DIGEST if method == "PUT" else ""
    stranger = Machine()
    forged = machine.headers(method, path, digest=digest) | {"x-cw-sender": site.enroll("b").peer}
    elsewhere = machine.headers(method, path.replace(DIGEST, "0" * 64), digest=digest)
    for headers in ({}, stranger.headers(method, path, digest=digest), forged, elsewhere):
        assert http.request(method, path, headers=headers, **body).status_code == 401
    once = machine.headers(method, path, digest=digest)
    assert http.request(method, path, headers=once, **body).status_code == 200
    assert http.request(method, path, headers=once, **body).status_code == 401


def test_a_removed_peer_gets_nothing_any_more(
    site: Site, http: httpx.Client, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    site.lane.save(MODEL)
    site.registry.remove(machine.peer, "test")
    assert get(http, machine, DIGEST).status_code == 401
    with pytest.raises(CommonweightError):
        link.download(DIGEST, len(DATA), tmp_path / "version.safetensors")


def test_the_digest_in_the_path_is_what_was_signed(http: httpx.Client, machine: Machine) -> None:
    """Else a signature for one body could be spent on another."""
    path = f"/cw/v1/updates/{DIGEST}"
    other = hashlib.sha256(b"other").hexdigest()
    answer = http.put(path, content=DATA, headers=machine.headers("PUT", path, digest=other))
    assert answer.status_code == 401


# --- a full disk -----------------------------------------------------------------------------


def test_an_upload_waits_for_room_and_is_then_taken(
    site: Site, http: httpx.Client, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    told: list[bool] = []
    source = tmp_path / "update"
    source.write_bytes(DATA)
    site.transfer.limits.on_shortage = lambda: told.append(True)
    site.transfer.limits.version_bytes = 1 << 62  # the next version would not fit
    try:
        assert put(http, machine, DATA).status_code == 507
        assert told
        assert "space on the coordinator's disk" in site.transfer.limits.shortage
        assert spool(site) == []
        with pytest.raises(CoordinatorDiskFull, match="disk is full"):
            link.upload(DIGEST, source)
    finally:
        site.transfer.limits.version_bytes = 0
        site.transfer.limits.on_shortage = lambda: None
    link.upload(DIGEST, source)
    assert spool(site) == [f"{machine.peer}-{DIGEST}.safetensors"]


def test_what_uploads_under_way_were_promised_is_taken(site: Site) -> None:
    """Two that fit one by one but not together are not both let in, to be stuck half way."""
    assert site.transfer.limits.promised_bytes == 0, "every upload so far gave its promise back"
    assert site.transfer.limits.has_space(len(DATA))
    site.transfer.limits.promised_bytes += site.transfer.limits.free_bytes
    assert not site.transfer.limits.has_space(len(DATA))
    site.transfer.limits.promised_bytes = 0


@pytest.mark.skipif(not can_mount(), reason="only root on Linux can mount a small disk")
def test_a_disk_that_fills_in_an_upload_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk), Site(disk).up() as site, site.http() as http:
        machine = site.enroll()
        site.transfer.limits.max_bytes = 4 << 20
        data = np.arange(512 * 1024, dtype=np.float32).tobytes()
        digest = hashlib.sha256(data).hexdigest()
        part = disk / "spool" / f"{machine.peer}-{digest}.part"
        ballast: list[Path] = []

        def body() -> Iterator[bytes]:
            yield data[: 1 << 20]
            wait_for(lambda: part.exists() and part.stat().st_size >= 1 << 19)
            ballast.append(fill(disk, 0))  # somebody else was quicker
            yield data[1 << 20 :]

        size = {"content-length": str(len(data))}
        answer = put(http, machine, body(), digest, **size)  # type: ignore[arg-type]
        assert answer.status_code == 507
        assert site.transfer.limits.shortage
        have = part.stat().st_size
        assert 0 < have < len(data)
        ballast[0].unlink()
        assert put(http, machine, data[have:], digest, offset=have).status_code == 200
        assert part.with_suffix(".safetensors").read_bytes() == data
