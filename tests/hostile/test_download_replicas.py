"""A replica that waits sends versions to agents. It can cost them time, and nothing else."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_store import VersionStore
from coordinator.storage.version_cache import VersionCache
from protocols.enrollment import identity
from protocols.errors import Unreachable
from protocols.local.atomic_files import write_private
from protocols.messages.work import DOWNLOAD_PATH
from protocols.model import weights
from protocols.model.weights import Weights
from tests.agent.transport.p2p.test_sharing import Loop
from tests.hostile.tools import LyingCoordinator
from tests.support.https_site import Machine, Site
from tests.support.waiting import wait_for

MODEL = Weights({"w": np.random.default_rng(7).standard_normal(820_000).astype(np.float32)})
DIGEST = weights.digest(MODEL)
SIZE = MODEL.nbytes + len(weights.header_bytes(MODEL.schema))

Send = Callable[[bytes], None]


def asked_for(head: bytes) -> tuple[int, int]:
    """The range of a request: from, and until before."""
    found = re.search(rb"range: bytes=(\d+)-(\d*)", head)
    return (int(found[1]), int(found[2] or SIZE - 1) + 1) if found else (0, SIZE)


def reply(head: bytes, send: Send, body: bytes, length: int) -> None:
    status = b"206 Partial Content" if b"range:" in head else b"200 OK"
    send(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status, length))
    send(body)


def other_bytes(head: bytes, send: Send) -> None:
    start, stop = asked_for(head)
    reply(head, send, b"x" * (stop - start), stop - start)


def a_wrong_beginning(head: bytes, send: Send) -> None:
    """The coordinator is left to send the rest of it."""
    start, stop = asked_for(head)
    reply(head, send, b"x" * ((stop - start) // 2), stop - start)


def too_little(head: bytes, send: Send) -> None:
    reply(head, send, b"x" * 10, 10)


def too_much(head: bytes, send: Send) -> None:
    reply(head, send, b"x" * (SIZE + 10), SIZE + 10)


def nothing(head: bytes, send: Send) -> None:
    """It closes the connection."""


def another_status(head: bytes, send: Send) -> None:
    send(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n")


def no_http(head: bytes, send: Send) -> None:
    send(b"\0" * 100)


ANSWERS = [
    *(other_bytes, a_wrong_beginning, too_little, too_much, nothing, another_status, no_http)
]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    with Site(folder).up() as up:
        up.lane.save(MODEL)
        yield up


@contextmanager
def replica(site: Site, folder: Path, answer: Callable[[bytes, Send], None]) -> Iterator[str]:
    """The address of a replica with the fleet's certificate."""
    liar = LyingCoordinator(folder, answer)
    liar._tls.load_cert_chain(site.folder / "server.pem", site.folder / "server.key")
    with liar.up():
        yield liar.address


def agent(site: Site, folder: Path, machine: Machine, *, shares: bool) -> VersionStore:
    home = folder / machine.name
    home.mkdir()
    write_private(home / "node.key", identity.private_pem(machine.node_key))
    credentials, sharing = site.credentials(machine), None
    if shares:
        public = identity.public_bytes(site.sign_key)
        sharing = Sharing("on", home, credentials, public)
    link = CoordinatorClient(credentials)
    return VersionStore(home, lambda: link, sharing)


@pytest.mark.attack("10")
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_lying_replica_costs_time_alone(
    site: Site, tmp_path: Path, answer: Callable[[bytes, Send], None], shares: bool
) -> None:
    """Attack: send other bytes than the version, as a replica that waits, or as a part of it."""
    heads: list[bytes] = []

    def heard(head: bytes, send: Send) -> None:
        heads.append(head)
        answer(head, send)

    with replica(site, tmp_path / "replica", heard) as address, Loop() as loop:
        store = agent(site, tmp_path, site.enroll("ann"), shares=shares)
        link = store._link()
        link.replicas.use([address])
        if (sharing := store._sharing) is not None:
            loop.start(sharing.run)
            wait_for(lambda: bool(sharing.plan_request().address))
        path = store.fetch(DIGEST, SIZE)
        assert weights.file_digest(path) == DIGEST
        assert len(heads) == 1, "and is not asked again"
        assert heads[0].startswith(b"GET " + DOWNLOAD_PATH.format(digest=DIGEST).encode())
        path.unlink()
        assert weights.file_digest(store.fetch(DIGEST, SIZE)) == DIGEST
        assert len(heads) == 1
        link.close()


@pytest.mark.attack("10")
def test_a_lying_replica_gives_no_other_one_a_bad_name(site: Site, tmp_path: Path) -> None:
    """Attack: send wrong bytes and close the connection, so that the digest does not match what the
    next replica has completed."""
    data, asked = site.lane.version_path(DIGEST).read_bytes(), list[bool]()

    def heard(head: bytes, send: Send) -> None:
        start, stop = asked_for(head)
        is_liar = not asked
        asked.append(is_liar)
        if is_liar:
            a_wrong_beginning(head, send)
        else:
            reply(head, send, data[start:stop], stop - start)

    with (
        replica(site, tmp_path / "one", heard) as one,
        replica(site, tmp_path / "two", heard) as two,
    ):
        store = agent(site, tmp_path, site.enroll("ann"), shares=False)
        link = store._link()
        link.replicas.use([one, two])
        liar, other = link.replicas._replicas
        assert weights.file_digest(store.fetch(DIGEST, SIZE)) == DIGEST
        assert asked == [True, False, False], "the other one sends all of it again"
        assert liar.rests_until
        assert not other.rests_until
        link.close()


@pytest.mark.attack("10")
def test_a_replica_that_stops_is_continued_and_asked_again_soon(site: Site, tmp_path: Path) -> None:
    """Control: it closes the connection in the middle."""
    data, half = site.lane.version_path(DIGEST).read_bytes(), SIZE // 2

    def stops(head: bytes, send: Send) -> None:
        reply(head, send, data[:half], SIZE)

    with replica(site, tmp_path / "replica", stops) as address:
        store = agent(site, tmp_path, site.enroll("ann"), shares=False)
        link = store._link()
        link.replicas.use([address])
        assert weights.file_digest(store.fetch(DIGEST, SIZE)) == DIGEST
        assert link.bytes_down == SIZE, "the coordinator has sent the rest alone"
        (stopped,) = link.replicas._replicas
        assert stopped.rests_until < time.monotonic() + 3600, "not as one that lies"
        link.close()


@pytest.mark.attack("10")
def test_an_agent_that_stops_does_not_wait_for_a_replica(site: Site, tmp_path: Path) -> None:
    """Attack: keep an agent waiting for the end of a version."""
    began, go_on = threading.Event(), threading.Event()

    def never_ends(head: bytes, send: Send) -> None:
        reply(head, send, b"x", SIZE)
        began.set()
        go_on.wait(60)

    with replica(site, tmp_path / "replica", never_ends) as address:
        store = agent(site, tmp_path, site.enroll("ann"), shares=False)
        link, told = store._link(), list[str]()
        link.replicas.use([address])

        def fetch() -> None:
            try:
                store.fetch(DIGEST, SIZE)
            except Unreachable as err:
                told.append(err.message)

        fetching = threading.Thread(target=fetch)
        fetching.start()
        assert began.wait(30)
        link.close()
        fetching.join(30)
        go_on.set()
        assert told == ["the connection to the coordinator is closed"]


@pytest.mark.attack("13")
def test_a_request_to_a_replica_is_none_to_the_coordinator(site: Site, tmp_path: Path) -> None:
    """Attack: send the request of an agent on to the coordinator, as a replica."""
    heads: list[bytes] = []

    def heard(head: bytes, send: Send) -> None:
        heads.append(head)

    with replica(site, tmp_path / "replica", heard) as address:
        store = agent(site, tmp_path, site.enroll("ann"), shares=False)
        store._link().replicas.use([address])
        store.fetch(DIGEST, SIZE)
        store._link().close()
    lines = heads[0].decode().split("\r\n")[1:]
    signed = dict(line.split(": ", 1) for line in lines if line.startswith("x-cw"))
    assert signed
    with site.http() as client:
        for path in (DOWNLOAD_PATH, "/cw/v1/weights/{digest}"):
            answer = client.get(path.format(digest=DIGEST), headers=signed)
            assert answer.status_code in (401, 404)


class SlowStore:
    """An object store that answers once it may, and has one version."""

    def __init__(self, digest: str) -> None:
        self.may_answer, self._digest, self.asked = threading.Event(), digest, list[str]()

    def get(self, digest: str, path: Path) -> bool:
        self.asked.append(digest)
        assert self.may_answer.wait(60)
        if digest == self._digest:
            path.write_bytes(b"version")
        return digest == self._digest


@pytest.mark.attack("10", by="peer")
async def test_one_peer_asks_a_replica_for_many_versions(tmp_path: Path) -> None:
    """Attack: ask for many versions that are not there, so that others get theirs no more."""
    store: Any = SlowStore("f" * 64)
    cache = VersionCache(tmp_path / "downloads", store)
    asked = [asyncio.create_task(cache.fetch(f"{number:064x}", "eve")) for number in range(20)]
    own = asyncio.create_task(cache.fetch("f" * 64, "ann"))
    joined = asyncio.create_task(cache.fetch("f" * 64, "eve"))
    for refused in asked[1:]:
        with pytest.raises(BlockingIOError):
            await refused
    store.may_answer.set()
    assert await asked[0] is None, "there is none"
    assert sorted(store.asked) == [f"{0:064x}", "f" * 64]
    path = await own
    assert path is not None
    assert path.read_bytes() == b"version"
    assert await joined == path, "a version that another peer has asked for costs nothing"
